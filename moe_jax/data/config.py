"""What to train and evaluate on, and how it is cut into batches."""

import dataclasses

from moe_jax.data.span_corruption import Spans

_POSITIVE = (
    "vocab_size",
    "seq_length",
    "batch_size",
    "shuffle_window",
    "eval_shuffle_window",
    "streams",
)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Parameters of the synthetic mixture of Markov languages (`moe_jax.data.mixture`).

    Attributes:
        num_languages: Number of first-order Markov languages.
        num_symbols: Size of the alphabet that all languages share, 2 to 94.
        document_length: Symbols in each document; a document is in one language.
        concentration: Dirichlet concentration of each row of the transition matrices; small
            values give predictable languages that differ much from each other.
        num_documents: Training documents.
        num_eval_documents: Validation documents.
        seed: Seed of the languages and of every document.
    """

    num_languages: int = 4
    num_symbols: int = 32
    document_length: int = 512
    concentration: float = 0.1
    num_documents: int = 8192
    num_eval_documents: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where a parameter is out of range."""
        for name in ("num_languages", "document_length", "num_documents", "num_eval_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"mixture.{name} must be at least 1, got {getattr(self, name)}.")
        if not 2 <= self.num_symbols <= 94:
            raise ValueError(f"mixture.num_symbols must be 2 to 94, got {self.num_symbols}.")
        if self.concentration <= 0:
            raise ValueError(f"mixture.concentration must be positive, got {self.concentration}.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
        source: `python_library` (the interpreter's own standard library), `mixture` (synthetic,
            with a known entropy), `files:GLOB` (local UTF-8 text files, one document each) or any
            prepared TFDS dataset, such as `lm1b`, `c4/en` or `wikipedia/20220301.en`.
        text_feature: The TFDS feature that holds a document's text.
        train_split: TFDS split expression of the training documents, such as `train[:90%]`.
            `files:` and `mixture` have fixed splits and ignore it.
        eval_split: TFDS split expression of the validation documents.
        data_dir: Where TFDS keeps prepared datasets, and where trained tokenizers are cached;
            None is the TFDS default.
        tokenizer: `bytes`, `sentencepiece` (trained on the training documents, then cached),
            `sentencepiece:PATH` (a model file that this package trained) or `hf:FOLDER` (the
            `tokenizer.json` of a released model; needs the package `tokenizers`).
        vocab_size: Vocabulary of a trained SentencePiece model, specials included.
        seq_length: Tokens in each row of a batch; those of the encoder if there is one.
        target_length: Tokens in each row of an encoder-decoder's targets; a decoder alone has none.
        spans: Cut spans out of each text for an encoder-decoder to restore (T5); None leaves the
            text whole, for a decoder.
        batch_size: Rows in each global batch, over all processes.
        eval_documents: Use only this many validation documents, the first ones; None is all.
        packing: Whether a row may hold pieces of several documents; otherwise each row is one
            piece of one document, padded.
        shuffle_window: Training rows that are shuffled together after packing, over all streams,
            so that the rows of one long document are spread out; 1 keeps the order of the
            shuffled documents.
        eval_shuffle_window: Validation rows that are shuffled together, alike for every seed; 1
            keeps the order of the documents, in which a group of tokens that are routed together
            may be of one document, unlike any in training.
        streams: Parts of the corpus that are read independently, each for its share of the rows of
            every batch. The order of the data depends on this and not on how many processes read
            it; at least the number of processes, which must divide it. It must divide the batch
            size.
        seed: Seed of the training order.
        prefetch: Batches prepared ahead on a background thread; 0 prepares them when asked.
        mixture: Parameters of the source `mixture`.
    """

    source: str = "python_library"
    text_feature: str = "text"
    train_split: str = "train"
    eval_split: str = "validation"
    data_dir: str | None = None
    tokenizer: str = "sentencepiece"
    vocab_size: int = 4096
    seq_length: int = 256
    target_length: int = 0
    spans: Spans | None = None
    batch_size: int = 16
    eval_documents: int | None = None
    packing: bool = True
    shuffle_window: int = 2048
    eval_shuffle_window: int = 1
    streams: int = 1
    seed: int = 0
    prefetch: int = 4
    mixture: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)

    def __post_init__(self) -> None:
        """Raises ValueError where a field is out of range."""
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.streams:
            raise ValueError(
                f"data.batch_size={self.batch_size} cannot be split over data.streams="
                f"{self.streams}; make it a multiple."
            )
        if self.eval_documents is not None and self.eval_documents < 1:
            raise ValueError(
                f"data.eval_documents must be None or at least 1, got {self.eval_documents}."
            )
        if self.spans is not None:
            _, fewest = self.spans.lengths(self.seq_length)
            if self.target_length < fewest:
                raise ValueError(
                    f"data.target_length={self.target_length} is too short: with data.spans, "
                    f"inputs of data.seq_length={self.seq_length} tokens have up to {fewest} "
                    "targets; use at least that."
                )
        if self.prefetch < 0:
            raise ValueError(f"data.prefetch must be at least 0, got {self.prefetch}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed must be in 0..2**32-1, got {self.seed}.")
