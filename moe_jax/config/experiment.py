"""The configuration of a run: all settings of a config file, typed, and checked before use."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from moe_jax import data
from moe_jax.config.frozen_schedules import FrozenStage, check_stages, frozen_stages
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.config.routing_groups import Group
from moe_jax.config.schedules import CosineRestarts
from moe_jax.config.setting_schedules import SettingSchedule, check_schedules
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig, EncoderDecoderConfig
from moe_jax.models.config import Tokens
from moe_jax.models.groups import check_adapters, leaves_in, leaves_without_adapters
from moe_jax.models.parts import groups_of
from moe_jax.models.places import places
from moe_jax.monitor import Alarm
from moe_jax.parallel import MeshConfig
from moe_jax.parallel.mesh import batch_shards
from moe_jax.ranges import Factor, Natural, Positive, Ranged, Seed, Share, Weight
from moe_jax.routing import Forced
from moe_jax.transport import check as check_transport


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Ranged):
    """Length, losses, logs and checkpoints of the training, and earlier runs that it uses.

    Attributes:
        steps: Number of optimizer steps.
        seed: Seed of the initial parameters and of all randomness in training.
        microbatches: Number of equal parts of a batch; their gradients are computed one after the
            other and added up, which saves memory.
        loss_chunk: Number of positions whose logits are held in memory at once; 0 means all.
        z_loss: Weight of the squared log-partition function of the output logits (T5: 1e-4).
        lookahead_weight: Weight of the multi-token prediction loss, if ``model.lookahead`` is set
            (DeepSeek-V3: 0.3, later 0.1).
        max_skipped_updates: Number of non-finite updates in a row after which the run stops; such
            updates are skipped.
        log_every: Number of steps between lines of ``metrics.jsonl``.
        writers: Writers of the numbers of ``metrics.jsonl``: ``tensorboard`` and ``wandb``.
        alarms: Rules on the log that warn or stop the run: dead experts, uneven loads, drops,
            saturated gates, a silent balance loss, drift of the load.
        eval_every: Number of steps between evaluations; 0 evaluates only at the end.
        checkpoint_every: Number of steps between checkpoints.
        keep_last: Number of newest checkpoints that are kept.
        keep_every: Distance in steps between older checkpoints that are also kept; 0 keeps none.
        keep_best: True also keeps the checkpoint with the lowest validation loss; such a step is
            saved when it is validated. ``--step=best`` opens it.
        patience: Number of validations in a row without a lower loss after which training ends;
            0 always trains ``steps`` steps.
        record_routing: True records the choices of every step in the folder ``routing/`` of the
            workdir.
        replay_routing: Folder ``routing/`` of another run, whose recorded choices the router
            ``forced`` repeats; "" means none.
        start_from: Workdir of a finished run, or folder of a released or converted model. This run
            starts from its weights and tokenizer, with a new optimizer state; "" means none. The
            folder is read once. A released model also gives its configuration.
        start_with: Weights that are taken from ``start_from``: ``all`` (they must match this
            model) or ``shared`` (weights of equal name and shape, except experts and routers;
            Switch, 2101.03961, section 4.2).
        teacher: Workdir of a finished run, or folder of a released or converted model, the teacher
            of a distillation. Its probabilities are the soft targets, and this run uses its
            tokenizer; "" means none.
        teacher_weight: Weight of the cross-entropy with the teacher's probabilities; the
            cross-entropy with the data has the weight ``1 - teacher_weight`` (Switch, table 6:
            0.25).
        noise_scale: True estimates the gradient noise scale (1812.06162) from the gradients of the
            microbatches, of which it needs at least 2.
        teacher_temperature: Number ``T`` by which the logits of teacher and run are divided in the
            cross-entropy with the teacher, which is multiplied by ``T^2`` (1503.02531, section 2).
        routing_weight: Weight of the divergence of the router's distribution over experts from the
            teacher's, in nats per token and as a mean over MoE layers; it trains routers alone.
        routing_groups: Group of each expert of the teacher, by MoE layer, numbered as the experts
            of this model; -1 leaves an expert out. Empty if the teacher has as many experts.
        schedules: Schedules of capacity factor, top-k, noise, weights of losses and frozen groups
            over the steps; validations read the settings of the model.
    """

    steps: Positive = 1000
    seed: Seed = 0
    microbatches: Positive = 1
    loss_chunk: Natural = 0
    z_loss: Weight = 0.0
    lookahead_weight: Weight = 0.3
    max_skipped_updates: Positive = 10
    log_every: Positive = 10
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    alarms: tuple[Alarm, ...] = ()
    eval_every: Natural = 0
    checkpoint_every: Positive = 200
    keep_last: Positive = 2
    keep_every: Natural = 0
    keep_best: bool = False
    patience: Natural = 0
    record_routing: bool = False
    replay_routing: str = ""
    start_from: str = ""
    start_with: Literal["all", "shared"] = "all"
    teacher: str = ""
    teacher_weight: Share = 0.25
    noise_scale: bool = False
    teacher_temperature: Factor = 1.0
    schedules: tuple[SettingSchedule, ...] = ()
    routing_weight: Weight = 0.0
    routing_groups: tuple[tuple[Group, ...], ...] = ()

    def check(self) -> None:
        """Rejects a noise scale without microbatches to compare.

        Raises:
            ConfigError: If so.
        """
        if self.noise_scale and self.microbatches == 1:
            raise ConfigError(
                "training.noise_scale compares the gradients of microbatches: set "
                "training.microbatches=2 or more, or unset training.noise_scale"
            )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The settings of a run.

    Attributes:
        name: Name of the run, for titles.
        model: The model.
        data: The corpus and its batches.
        optimizer: The optimizer.
        training: Length, losses, logs and checkpoints of the training.
        mesh: The mesh of devices.

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
        """Names of the layers that have experts: the index from 0, after the name of the stack."""
        return tuple(layer.name for layer in self.model.sparse_layers())

    @property
    def vocab_size(self) -> int:
        """Number of ids in the configuration, sentinels included; a small corpus can have fewer."""
        text = data.Bytes.vocab_size if self.data.tokenizer == "bytes" else self.data.vocab_size
        return text + self.data.sentinels

    @property
    def frozen_leaves(self) -> frozenset[str]:
        """Names of the leaves of a state that training leaves as they are.

        A model with adapters trains no other parameter.

        Raises:
            ConfigError: If ``optimizer.frozen`` names no group of the model, or all parameters.
        """
        frozen = self.optimizer.frozen
        named = leaves_in(self.model, frozen, "optimizer.frozen") if frozen else frozenset()
        return named if self.model.lora is None else named | leaves_without_adapters(self.model)

    @property
    def frozen_stages(self) -> tuple[FrozenStage, ...]:
        """Groups of arrays that ``training.schedules`` freezes at some steps.

        Raises:
            ConfigError: If the model has no such group.
        """
        return frozen_stages(self.training.schedules, self.model)

    @property
    def sequence(self) -> Tokens:
        """The numbers of tokens in one row."""
        return Tokens(self.data.seq_length, self.data.target_length)

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens in a batch, padding included."""
        return self.data.batch_size * (self.data.seq_length + self.data.target_length)

    def check(self, num_devices: int) -> None:
        """Rejects a run that cannot work, before anything expensive starts.

        Args:
            num_devices: Number of devices of the run.

        Raises:
            ConfigError: If settings contradict each other; the message is one line and names the
                setting to change.
            FileNotFoundError: If the data does not exist.
            ValueError: If the data does not fit the settings.
        """
        self.check_program(num_devices)
        self._check_adapters()
        self._check_kind()
        self._check_replay()
        data.check_tokenizer(self.data)
        data.check_source(self.data)

    def check_settings(self) -> None:
        """Rejects settings that contradict each other on any number of devices.

        Raises:
            ConfigError: If so; the message is one line and names the setting to change.
        """
        self.model.check_layers()
        self.training.check()
        check_adapters(self.model)
        self._check_frozen()
        self._check_expert_rates()
        check_schedules(self.training.schedules, self.model)
        check_stages(self.frozen_stages, self.model, self.optimizer.frozen, self.frozen_leaves)
        for name in ("seq_length", "target_length"):
            self.model.check_length(getattr(self.data, name), f"data.{name}")
        ahead = getattr(self.model, "lookahead", 0)
        if ahead >= self.data.seq_length:
            raise ConfigError(
                f"model.lookahead={ahead} is beyond data.seq_length={self.data.seq_length}: a row "
                "has no token so far ahead; lower it"
            )
        if ahead and self.data.marks_answers:
            raise ConfigError(
                f"model.lookahead={ahead} predicts prompts too: unset it, or data.prompt_feature "
                "and data.messages_feature"
            )
        if isinstance(self.optimizer.schedule, CosineRestarts):
            self.optimizer.schedule.check(self.optimizer.warmup_steps, self.training.steps)
        self.check_vocabulary(self.vocab_size)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Rejects routers that cannot route every id of the tokenizer.

        Args:
            vocab_size: Number of ids.

        Raises:
            ConfigError: If so; the message is one line and names the setting to change.
        """
        for layer in self.model.sparse_layers():
            try:
                layer.moe.router.select.check_vocabulary(vocab_size)
            except ConfigError as error:
                raise ConfigError(f"model.{layer.setting}.router: {error}") from error

    def check_program(self, num_devices: int) -> None:
        """Rejects a batch or a model that does not divide over the mesh; the data is not needed.

        Args:
            num_devices: Number of devices of the run.

        Raises:
            ConfigError: If so; the message is one line and names the setting to change.
        """
        self.check_settings()
        mesh = self.mesh.resolve(num_devices)
        self._check_batch(mesh)
        self.check_model(mesh)

    def _check_frozen_experts(self) -> None:
        first = self.optimizer.frozen_experts
        if first and not self.model.sparse_layers():
            raise ConfigError("optimizer.frozen_experts: no layer has experts; unset it")
        for layer in self.model.sparse_layers() if first else ():
            if layer.moe.expert_dims:
                raise ConfigError(
                    "optimizer.frozen_experts counts experts of one width: unset it, or "
                    f"expert_dims of layer {layer.name}"
                )
            if first >= layer.moe.num_experts:
                raise ConfigError(
                    f"optimizer.frozen_experts={first} freezes all {layer.moe.num_experts} experts "
                    f"of layer {layer.name}: lower it, or set optimizer.frozen=('experts',)"
                )

    def _check_frozen(self) -> None:
        self._check_frozen_experts()
        if not self.optimizer.frozen:
            return
        trained = {place.leaf for place in places(self.model).values()} - self.frozen_leaves
        if not any(leaf.startswith("params/") for leaf in trained):
            raise ConfigError("optimizer.frozen names all parameters: leave one group out")

    def _check_expert_rates(self) -> None:
        rates = self.optimizer.expert_rates
        if rates is None:
            return
        rates.check()
        frozen = self.frozen_leaves
        names = {name for name, place in places(self.model).items() if place.leaf not in frozen}
        if not any("experts" in groups_of(name) for name in names):
            raise ConfigError(
                "optimizer.expert_rates needs trained experts, and this model has none: unset it"
            )

    def _check_adapters(self) -> None:
        training = self.training
        if self.model.lora is not None and not (
            training.start_from and training.start_with == "all"
        ):
            raise ConfigError(
                "model.lora adapts a trained model: set training.start_from to its folder, and "
                "training.start_with=all"
            )

    def _check_kind(self) -> None:
        if isinstance(self.model, EncoderDecoderConfig):
            if self.data.spans is None:
                raise ConfigError(
                    "model.type=EncoderDecoderConfig needs span corruption, which cuts its targets "
                    "out of a text: set data.spans.sentinels=100, or use DecoderConfig"
                )
            if self.data.mask_rate:
                raise ConfigError(
                    "an encoder-decoder restores spans: unset data.mask_rate, or use DecoderConfig"
                )
            return
        if self.data.spans is not None or self.data.target_length:
            raise ConfigError(
                "a decoder alone reads whole texts: unset data.spans and data.target_length, or "
                "use model.type=EncoderDecoderConfig"
            )
        if self.model.causal and self.data.mask_rate:
            raise ConfigError(
                f"data.mask_rate={self.data.mask_rate} is for a model that reads in both "
                "directions: set model.causal=False, or unset data.mask_rate"
            )
        if not self.model.causal and not self.data.mask_rate:
            raise ConfigError(
                "model.causal=False reads the next token, which it should predict: set "
                "data.mask_rate=0.15"
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

    def check_experts(self, parts: int) -> None:
        """Rejects MoE layers whose experts a mesh does not divide.

        Args:
            parts: Size of the mesh along ``expert``.

        Raises:
            ConfigError: If so.
        """
        for layer in self.model.sparse_layers():
            if layer.moe.num_experts % parts:
                raise ConfigError(
                    f"model.{layer.setting}.num_experts={layer.moe.num_experts} is not divisible "
                    f"by mesh.expert={parts}"
                )

    def check_model(self, mesh: MeshConfig) -> None:
        """Rejects a model that does not divide over the mesh.

        Args:
            mesh: Sizes of the mesh, all resolved.

        Raises:
            ConfigError: If so; the message names the setting to change.
        """
        model = self.model
        layers = model.sparse_layers()
        self.check_experts(mesh.expert)
        for layer in layers:
            setting = f"model.{layer.setting}"
            check_transport(layer.moe, setting, mesh.expert, same_width=not layer.in_attention)
        split = {
            "num_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads or model.num_heads,
            **{
                f"attention_overrides[{i}].num_kv_heads": other.num_kv_heads
                for i, other in enumerate(model.attention_overrides)
            },
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
