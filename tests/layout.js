// The texts of a page that cover each other, or are cut off by the edge of a figure.
() => {
  const SLACK = 2;

  // Corners of a text, in order: a leaning text of a figure has a leaning box.
  function corners(node) {
    const parent = node.parentElement, figure = parent.closest("svg");
    if (figure && parent.getBBox) {
      const box = parent.getBBox(), place = parent.getScreenCTM();
      const points = [[box.x, box.y], [box.x + box.width, box.y],
        [box.x + box.width, box.y + box.height], [box.x, box.y + box.height]];
      return [points.map(([x, y]) => new DOMPoint(x, y).matrixTransform(place))];
    }
    const range = document.createRange();
    range.selectNodeContents(node);
    return [...range.getClientRects()].map((r) => [{ x: r.left, y: r.top }, { x: r.right, y: r.top },
      { x: r.right, y: r.bottom }, { x: r.left, y: r.bottom }]);
  }

  function bounds(points) {
    const x = points.map((p) => p.x), y = points.map((p) => p.y);
    return { left: Math.min(...x), right: Math.max(...x), top: Math.min(...y), bottom: Math.max(...y) };
  }

  // True if the box lies inside of every ancestor that scrolls or hides what is beyond its edge.
  function shown(node, box) {
    for (let one = node.parentElement; one && one !== document.body; one = one.parentElement) {
      if (one.closest("svg") || getComputedStyle(one).overflowX === "visible") continue;
      const edge = one.getBoundingClientRect();
      if (box.left > edge.right - SLACK || box.right < edge.left + SLACK) return false;
    }
    return true;
  }

  // Two convex boxes are apart if they are apart along the normal of one of their sides.
  function apart(one, other) {
    for (const points of [one, other]) {
      for (let i = 0; i < points.length; i++) {
        const next = points[(i + 1) % points.length];
        const x = next.y - points[i].y, y = points[i].x - next.x, size = Math.hypot(x, y) || 1;
        const along = (shape) => shape.map((p) => (p.x * x + p.y * y) / size);
        const a = along(one), b = along(other);
        if (Math.min(...a) > Math.max(...b) - SLACK || Math.min(...b) > Math.max(...a) - SLACK) return true;
      }
    }
    return false;
  }

  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), texts = [], cut = [];
  for (let node; (node = walker.nextNode());) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, title, option, textarea")) continue;
    if (!parent.checkVisibility()) continue;
    for (const points of corners(node)) {
      const box = bounds(points), figure = parent.closest("svg");
      if (figure) {
        const edge = figure.getBoundingClientRect();
        const outside = Math.max(edge.left - box.left, box.right - edge.right, edge.top - box.top,
          box.bottom - edge.bottom);
        if (outside > SLACK) cut.push(node.data);
      }
      if (box.right > box.left && shown(node, box)) texts.push({ node, points, box });
    }
  }
  texts.sort((a, b) => a.box.top - b.box.top);
  const covered = [];
  texts.forEach((one, i) => {
    for (let j = i + 1; j < texts.length && texts[j].box.top < one.box.bottom; j++) {
      const other = texts[j];
      if (other.box.left > one.box.right || other.box.right < one.box.left) continue;
      // An element of a line may contain another one, such as bold text in a passage.
      if (one.node !== other.node && !apart(one.points, other.points)) {
        covered.push([one.node.data, other.node.data]);
      }
    }
  });
  return { number: texts.length, covered: covered.slice(0, 5), cut: cut.slice(0, 5) };
}
