"""The configuration of a run: everything a config file may say, typed, and checked before use."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from moe_jax import data
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig, EncoderDecoderConfig
from moe_jax.models.config import Tokens
from moe_jax.parallel import MeshConfig
from moe_jax.parallel.mesh import batch_shards
from moe_jax.ranges import Natural, Positive, Ranged, Seed, Share, Weight
from moe_jax.routing import Forced
from moe_jax.transport import check as check_transport


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Ranged):
    """Length and rhythm of a run.

    Attributes:
        steps: optimizer steps.
        seed: of parameters and of everything random in training.
        microbatches: parts of the batch computed one after the other, for memory.
        loss_chunk: positions whose logits are held at once; 0 for all.
        z_loss: weight of the squared log-partition of the head (T5 uses 1e-4).
        lookahead_weight: weight of the loss of tokens further ahead, if ``model.lookahead``; 0.3
            and later 0.1 in DeepSeek-V3.
        max_skipped_updates: the run stops after so many non-finite updates in a row.
        log_every: steps between lines of ``metrics.jsonl``.
        eval_every: steps between evaluations; 0 for the end alone.
        checkpoint_every: steps between checkpoints.
        keep_last: newest checkpoints kept.
        keep_every: also keep checkpoints at multiples of this; 0 for none.
        record_routing: write every step's choices to ``routing/`` of the workdir.
        replay_routing: such a folder, whose choices the router ``forced`` repeats; "" for none.
        start_from: workdir of a finished run, or folder of a released or converted model, whose
            weights this run starts from, with an optimizer of its own; "" for none. It is read
            once, and its tokenizer is taken; of a released model also the configuration.
        start_with: ``all`` weights, which must then match, or ``shared``: those of equal name and
            shape that are no experts' and no routers' (Switch, 2101.03961, section 4.2).
        teacher: workdir of a finished run whose probabilities are soft targets; "" for none. Its
            tokenizer is taken.
        teacher_weight: of the cross-entropy against the teacher's; that of the data has the rest.
            0.25 in Switch's table 6.
    """

    steps: Positive = 1000
    seed: Seed = 0
    microbatches: Positive = 1
    loss_chunk: Natural = 0
    z_loss: Weight = 0.0
    lookahead_weight: Weight = 0.3
    max_skipped_updates: Positive = 10
    log_every: Positive = 10
    eval_every: Natural = 0
    checkpoint_every: Positive = 200
    keep_last: Positive = 2
    keep_every: Natural = 0
    record_routing: bool = False
    replay_routing: str = ""
    start_from: str = ""
    start_with: Literal["all", "shared"] = "all"
    teacher: str = ""
    teacher_weight: Share = 0.25


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole run.

    Attributes:
        name: for titles.
        model: the model.
        data: the corpus and its batches.
        optimizer: the optimizer.
        training: length and rhythm.
        mesh: the devices.

    Examples:
        >>> import moe_jax as mj
        >>> experiment = mj.experiment("quickstart")
        >>> experiment.moe_layers, experiment.tokens_per_step
        ((1, 3), 2048)
        >>> isinstance(experiment, mj.Experiment)
        True
    """

    name: str
    model: DecoderConfig | EncoderDecoderConfig = DecoderConfig()
    data: data.DataConfig = data.DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def moe_layers(self) -> tuple[str | int, ...]:
        """Names of the layers that have experts: indices from 0, after their stack's name."""
        return tuple(layer.name for layer in self.model.sparse_layers())

    @property
    def vocab_size(self) -> int:
        """Ids that the configuration asks for, sentinels included; training may find fewer."""
        text = data.Bytes.vocab_size if self.data.tokenizer == "bytes" else self.data.vocab_size
        return text + (self.data.spans.sentinels if self.data.spans else 0)

    @property
    def sequence(self) -> Tokens:
        """The tokens of one row."""
        return Tokens(self.data.seq_length, self.data.target_length)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a batch, padding included."""
        return self.data.batch_size * (self.data.seq_length + self.data.target_length)

    def check(self, num_devices: int) -> None:
        """Refuses what cannot run, before anything expensive starts.

        Raises:
            ConfigError: one line, naming the setting to change.
            FileNotFoundError: if the data is not there.
            ValueError: if the data cannot serve.
        """
        self.check_program(num_devices)
        self._check_kind()
        self._check_replay()
        data.check_tokenizer(self.data)
        data.check_source(self.data)

    def check_settings(self) -> None:
        """Refuses settings that do not go together, whatever the devices.

        Raises:
            ConfigError: one line, naming the setting to change.
        """
        self.model.check_layers()
        for name in ("seq_length", "target_length"):
            self.model.check_length(getattr(self.data, name), f"data.{name}")
        ahead = getattr(self.model, "lookahead", 0)
        if ahead >= self.data.seq_length:
            raise ConfigError(
                f"model.lookahead={ahead} is beyond data.seq_length={self.data.seq_length}: no "
                "token so far ahead is in the row; lower it"
            )
        self.check_vocabulary(self.vocab_size)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses routers that cannot route every id of the tokenizer.

        Raises:
            ConfigError: one line, naming the setting to change.
        """
        for layer in self.model.sparse_layers():
            try:
                layer.moe.router.select.check_vocabulary(vocab_size)
            except ConfigError as error:
                raise ConfigError(f"model.{layer.setting}.router: {error}") from error

    def check_program(self, num_devices: int) -> None:
        """Refuses a batch or model that the mesh cannot hold; the data need not be there.

        Raises:
            ConfigError: one line, naming the setting to change.
        """
        self.check_settings()
        mesh = self.mesh.resolve(num_devices)
        self._check_batch(mesh)
        self._check_model(mesh)

    def _check_kind(self) -> None:
        if isinstance(self.model, EncoderDecoderConfig):
            if self.data.spans is None:
                raise ConfigError(
                    "model.type=EncoderDecoderConfig restores spans that are cut out of a text: "
                    "set data.spans.sentinels=100, or use DecoderConfig"
                )
        elif self.data.spans is not None or self.data.target_length:
            raise ConfigError(
                "a decoder alone reads whole texts: unset data.spans and data.target_length, or "
                "use model.type=EncoderDecoderConfig"
            )

    def _check_batch(self, mesh: MeshConfig) -> None:
        shards, rows = batch_shards(mesh), self.data.batch_size
        parts = self.training.microbatches
        if rows % (parts * shards):
            raise ConfigError(
                f"data.batch_size={rows} does not divide into training.microbatches={parts} x "
                f"mesh data={mesh.data} x fsdp={mesh.fsdp} x expert={mesh.expert}: use a multiple "
                f"of {parts * shards}"
            )
        name = "target_length" if self.data.target_length else "seq_length"
        chunk, scored = self.training.loss_chunk, getattr(self.data, name)
        if chunk and scored % (chunk * mesh.sequence):
            raise ConfigError(
                f"training.loss_chunk={chunk} x mesh.sequence={mesh.sequence} does not divide "
                f"data.{name}={scored}"
            )
        for name in ("seq_length", "target_length"):
            if getattr(self.data, name) % mesh.sequence:
                raise ConfigError(
                    f"data.{name}={getattr(self.data, name)} is not divisible by "
                    f"mesh.sequence={mesh.sequence}"
                )
        for layer in self.model.sparse_layers():
            name = "seq_length" if layer.of_inputs else "target_length"
            tokens = rows * getattr(self.data, name) // (parts * shards * mesh.sequence)
            size = layer.moe.group_size
            if tokens % size and size % tokens:
                raise ConfigError(
                    f"model.{layer.setting}.group_size={size} neither divides nor is a multiple of "
                    f"the {tokens} tokens of a microbatch on each device: change it, "
                    f"data.batch_size or data.{name}"
                )

    def _check_replay(self) -> None:
        training = self.training
        layers = self.model.sparse_layers()
        forced = [layer for layer in layers if isinstance(layer.moe.router.select, Forced)]
        if forced and not training.replay_routing:
            raise ConfigError(
                "the router forced repeats a recorded routing: set training.replay_routing to the "
                "routing/ folder of a run with training.record_routing=True"
            )
        if training.replay_routing and (not layers or len(forced) < len(layers)):
            raise ConfigError(
                "training.replay_routing needs model.moe.router.preset=forced in every MoE layer, "
                "with the k, scored_by, normalize and scale of the recorded router"
            )
        if training.replay_routing and not Path(training.replay_routing).is_dir():
            raise ConfigError(f"training.replay_routing={training.replay_routing} is not a folder")

    def _check_model(self, mesh: MeshConfig) -> None:
        model = self.model
        layers = model.sparse_layers()
        for layer in layers:
            experts = layer.moe.num_experts
            if experts % mesh.expert:
                raise ConfigError(
                    f"model.{layer.setting}.num_experts={experts} is not divisible by "
                    f"mesh.expert={mesh.expert}"
                )
            setting = f"model.{layer.setting}"
            check_transport(layer.moe, setting, mesh.expert, same_width=not layer.in_attention)
        split = {
            "num_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads or model.num_heads,
            "mlp_dim": model.mlp_dim,
            **{f"{layer.setting}.shared.hidden": layer.moe.shared.hidden for layer in layers},
        }
        widths = {
            (f"{layer.setting}.expert_dim", width)
            for layer in layers
            if not layer.in_attention
            for width in layer.moe.widths
        }
        sizes = [*split.items(), *sorted(widths)]
        for name, size in sizes:
            if size % mesh.model:
                raise ConfigError(
                    f"model.{name}={size} is not divisible by mesh.model={mesh.model}"
                )
