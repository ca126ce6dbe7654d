"""Settings of the data: source, tokenizer, rows and batches."""

import dataclasses
from typing import Annotated

from moe_jax.data.span_corruption import Spans
from moe_jax.ranges import Chance, Factor, Natural, Positive, Range, Ranged, Seed, Vocabulary

Languages = Annotated[int, Range(1, 10_000)]
BLEND = "blend"
OneIn = Annotated[int, Range(2, 1_000_000)]
# The alphabet is printable ASCII.
Symbols = Annotated[int, Range(2, 94)]


@dataclasses.dataclass(frozen=True)
class MixtureConfig(Ranged):
    """Parameters of the synthetic mixture of Markov languages (``moe_jax.data.mixture``).

    Attributes:
        num_languages: Number of first-order Markov languages.
        num_symbols: Size of the alphabet that all languages share, 2 to 94.
        document_length: Number of symbols in each document; a document is in one language.
        concentration: Dirichlet concentration of each row of the transition matrices; small
            values give predictable languages that differ much from each other.
        num_documents: Number of training documents.
        num_eval_documents: Number of validation documents.
        seed: Seed of the languages and of every document.
    """

    num_languages: Languages = 4
    num_symbols: Symbols = 32
    document_length: Positive = 512
    concentration: Factor = 0.1
    num_documents: Positive = 8192
    num_eval_documents: Positive = 256
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class PartConfig(Ranged):
    """One source of a blend.

    Attributes:
        source: Source as ``data.source``; no blend.
        name: Name of the part in metrics and reports; "" is ``source``.
        weight: Share of the training rows, relative to the other parts; ``None`` in all parts takes
            the shares from their sizes, see ``data.blend.temperature``.
        text_feature: See ``data.text_feature``.
        prompt_feature: See ``data.prompt_feature``.
        messages_feature: See ``data.messages_feature``.
        train_split: See ``data.train_split``.
        eval_split: See ``data.eval_split``.
        eval_source: See ``data.eval_source``.
        eval_one_in: See ``data.eval_one_in``.
    """

    source: str
    name: str = ""
    weight: Factor | None = None
    text_feature: str = "text"
    prompt_feature: str = ""
    messages_feature: str = ""
    train_split: str = "train"
    eval_split: str = "validation"
    eval_source: str = ""
    eval_one_in: OneIn = 20

    @property
    def title(self) -> str:
        """Name of the part."""
        return self.name or self.source


@dataclasses.dataclass(frozen=True)
class BlendConfig(Ranged):
    """Weighted mixture of sources, for the source ``blend``.

    Attributes:
        parts: The sources, with their weights. Each part has a validation loss of its own.
        temperature: Without weights, a part of ``n`` bytes has a share of the training rows in
            proportion to ``n ** (1 / temperature)``: 1 is in proportion to size, and a high
            temperature gives equal shares (mT5, 2010.11934, section 3.2, with alpha = 1 /
            temperature).
    """

    parts: tuple[PartConfig, ...] = ()
    temperature: Factor = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError if names repeat, or if only some parts have a weight."""
        super().__post_init__()
        titles = [part.title for part in self.parts]
        twice = [title for title in titles if titles.count(title) > 1]
        if twice:
            raise ValueError(
                f"data.blend.parts has two parts {twice[0]!r}: give each a name of its own"
            )
        unweighted = [part.title for part in self.parts if part.weight is None]
        if 0 < len(unweighted) < len(self.parts):
            raise ValueError(
                f"data.blend.parts: {unweighted[0]!r} has no weight and others have one: set the "
                "weight of all parts or of none"
            )
        if any(part.source == BLEND for part in self.parts):
            raise ValueError("data.blend.parts: a part cannot be a blend; list its parts instead")


@dataclasses.dataclass(frozen=True)
class DataConfig(Ranged):
    """The data of a run.

    Attributes:
        source: Corpus of the run: ``python_library`` (the interpreter's own standard library),
            ``mixture`` (synthetic, with a known entropy), ``files:GLOB`` (local files: a UTF-8 text
            file is one document; a ``.jsonl`` file, which may end in ``.gz`` or ``.zst``, has one
            in each line, and a ``.parquet`` file one in each row), ``hf:NAME`` or
            ``hf:NAME/CONFIG`` (a local folder, or a dataset of the Hugging Face Hub, such as
            ``hf:allenai/c4/en``; needs the package ``datasets``) or any prepared TFDS dataset, such
            as ``lm1b``, ``c4/en`` or ``wikipedia/20220301.en``; or ``blend``, a weighted mixture of
            such sources.
        text_feature: Feature, JSON key or column that holds the text of a document.
        prompt_feature: Key or column of the prompts of instruction data. A document is then a
            prompt and its answer, the text of ``text_feature``, and only the answer counts in the
            losses. "" for plain texts.
        messages_feature: Key or column of dialogues, in place of ``text_feature``: lists of
            messages ``{"role": ..., "content": ...}``. The chat template of the tokenizer forms the
            text, and only the messages of the role ``assistant`` count in the losses. "" for plain
            texts.
        train_split: Split of the training documents: the name of a split or, for TFDS, a split
            expression such as ``train[:90%]``. ``files:`` and ``mixture`` have fixed splits and
            ignore it.
        eval_split: Split of the validation documents, as ``train_split``. For ``hf:``, "" takes
            documents of ``train_split``; see ``eval_one_in``.
        eval_source: Source of the validation documents, such as ``files:held_out/*.jsonl``: all its
            documents, or its ``eval_split``. ``source`` is then for training only. "" takes them
            from ``source``.
        eval_one_in: Number of documents per document for validation, of ``files:`` and of ``hf:``
            without ``eval_split``; of a single document, number of spans per span for validation.
        data_dir: Folder of prepared TFDS datasets, of documents read from files with many, and of
            cached tokenizers; ``None`` is the default of TFDS.
        tokenizer: Tokenizer of the run: ``bytes``, ``sentencepiece`` (trained on the training
            documents, then cached), ``sentencepiece:PATH`` (a model file that this package
            trained) or ``hf:FOLDER`` (the ``tokenizer.json`` of a released model; needs the package
            ``tokenizers``).
        vocab_size: Vocabulary size of a trained SentencePiece model, specials included.
        seq_length: Number of tokens in each row of a batch; in an encoder-decoder, in each row of
            the encoder.
        target_length: Number of tokens in each target row of an encoder-decoder; 0 for a
            decoder-only model.
        spans: Span corruption of T5: spans are cut out of each text, and an encoder-decoder
            restores them. ``None`` leaves the text whole, for a decoder-only model.
        mask_rate: Share of the tokens that a mask replaces and the model predicts (BERT,
            1810.04805, section 3.1, here always by a mask); the model then reads in both directions
            (``model.causal=False``). 0 predicts every next token.
        batch_size: Number of rows in each global batch, over all processes.
        train_documents: Number of training documents to use, from the first; ``None`` uses all. Of
            ``hf:``, no more documents than these are read.
        eval_documents: Number of validation documents to use, from the first; ``None`` uses all.
        packing: Whether a row may hold pieces of several documents; otherwise each row is one
            piece of one document, padded.
        shuffle_window: Number of training rows that are shuffled together after packing, over all
            streams. 0 shuffles all rows of the corpus anew in each epoch; the tokens are then kept
            in a file of 2 or 4 bytes per token. A corpus too large for such a file needs a window:
            the rows of a long document then stay near each other, and a run shorter than an epoch
            sees only the documents that its seed orders first. 1 keeps the order of the shuffled
            documents.
        eval_shuffle_window: Number of validation rows that are shuffled together, alike for every
            seed. 1 keeps the order of the documents; a group of tokens that are routed together may
            then come from one document, which does not happen in training.
        streams: Number of parts of the corpus that are read independently; each part fills its
            share of the rows of every batch. The order of the data depends on this number and not
            on the number of processes. The number of processes must divide it, and it must divide
            the batch size. All streams of a blend take their next row from the same part, so a
            batch has the shares of the parts only if each stream fills several rows of it.
        seed: Seed of the training order.
        prefetch: Number of batches that a background thread prepares ahead; 0 prepares each batch
            on request.
        mixture: Parameters of the source ``mixture``.
        blend: Parts of the source ``blend``. Its parts have their own settings in place of those
            above with the same names; ``train_documents`` and ``eval_documents`` limit each part.
    """

    source: str = "python_library"
    text_feature: str = "text"
    train_split: str = "train"
    eval_split: str = "validation"
    eval_source: str = ""
    eval_one_in: OneIn = 20
    prompt_feature: str = ""
    messages_feature: str = ""
    data_dir: str | None = None
    tokenizer: str = "sentencepiece"
    vocab_size: Vocabulary = 4096
    seq_length: Positive = 256
    target_length: Natural = 0
    spans: Spans | None = None
    mask_rate: Chance = 0.0
    batch_size: Positive = 16
    train_documents: Positive | None = None
    eval_documents: Positive | None = None
    packing: bool = True
    shuffle_window: Natural = 2048
    eval_shuffle_window: Positive = 1
    streams: Positive = 1
    seed: Seed = 0
    prefetch: Natural = 4
    mixture: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    blend: BlendConfig = dataclasses.field(default_factory=BlendConfig)

    @property
    def parts(self) -> dict[str, "DataConfig"]:
        """The data config of each part of a blend by name, or this one under ""."""
        if self.source != BLEND:
            return {"": self}
        own = {field.name for field in dataclasses.fields(PartConfig)} - {"name", "weight"}
        return {
            part.title: dataclasses.replace(
                self, blend=BlendConfig(), **{name: getattr(part, name) for name in own}
            )
            for part in self.blend.parts
        }

    @property
    def marks_answers(self) -> bool:
        """Whether only the answers of instruction data are targets, in some part at least."""
        return any(part.prompt_feature or part.messages_feature for part in self.parts.values())

    @property
    def sentinels(self) -> int:
        """Number of ids above the text's: one per sentinel of spans, or one for the mask."""
        return self.spans.sentinels if self.spans else int(self.mask_rate > 0)

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range or two fields do not fit together."""
        super().__post_init__()
        if self.source == BLEND and not self.blend.parts:
            raise ValueError("data.source='blend' has no sources: list them in data.blend.parts")
        if self.marks_answers:
            self._check_answers()
        if self.batch_size % self.streams:
            raise ValueError(
                f"data.batch_size={self.batch_size} cannot be split over data.streams="
                f"{self.streams}; set it to a multiple of data.streams."
            )
        if self.spans is not None:
            _, fewest = self.spans.lengths(self.seq_length)
            if self.target_length < fewest:
                raise ValueError(
                    f"data.target_length={self.target_length} is too short: with data.spans, "
                    f"inputs of data.seq_length={self.seq_length} tokens have up to {fewest} "
                    "targets; use at least that many."
                )

    def _check_answers(self) -> None:
        """Raises ValueError if another setting does not fit to instruction data."""
        if self.prompt_feature and self.messages_feature:
            raise ValueError(
                "data.prompt_feature and data.messages_feature are both set: a document is either "
                "a prompt with its answer or a dialogue; unset one"
            )
        if self.spans is not None or self.mask_rate:
            raise ValueError(
                "data.prompt_feature and data.messages_feature select the targets: unset "
                "data.spans and data.mask_rate"
            )
        if not self.shuffle_window:
            raise ValueError(
                "data.shuffle_window=0 keeps no marks of answers: set it to 1 or more; instruction "
                "data is shuffled by whole documents anyway"
            )
        for part in self.parts.values():
            asked = part.prompt_feature or part.messages_feature
            for source in filter(None, (part.source, part.eval_source)):
                if asked and not source.startswith(("files:", "hf:")):
                    raise ValueError(
                        f"{source!r} has no field {asked!r}: instruction data comes from files: or "
                        "hf:"
                    )
