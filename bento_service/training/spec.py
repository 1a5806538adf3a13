"""What a trainer is told: options as a user writes them, and the resolved specification of one job.

``TrlOptions`` is the one extension object of the HTTP API. ``TrainingSpec`` is what a run directory holds:
complete, with no "auto" left that depends on the request, so that the same file always trains the same way.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The losses of trl 1.16's DPOConfig.loss_type.
LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]

# How a frozen base model's weights can be kept: 4 bits each (NormalFloat, arXiv 2305.14314), or 8 (arXiv 2208.07339).
QuantizationName = Literal["nf4", "int8"]

# Losses that are no mean over pairs: they need the whole batch's log-probabilities.
COUPLED_LOSSES: frozenset[LossType] = frozenset({"aot", "aot_unpaired", "sft"})

# The methods of training that have a name; those that a job can ask for have a recipe in ``training.recipes``.
MethodName = Literal["dpo", "supervised", "kto", "reward"]

# Peak learning rates: for full fine-tuning the defaults of TRL's DPOConfig, SFTConfig and KTOConfig, and through a
# LoRA adapter ten times that, the factor that TRL's PEFT guide gives (https://huggingface.co/docs/trl/peft_integration).
# Of reward models both are those of TRL's example (examples/scripts/reward_modeling.py).
LEARNING_RATES: dict[MethodName, dict[Literal["full", "lora"], float]] = {
    "dpo": {"full": 1e-6, "lora": 1e-5},
    "supervised": {"full": 2e-5, "lora": 2e-4},
    "kto": {"full": 1e-6, "lora": 1e-5},
    "reward": {"full": 1e-5, "lora": 1e-4},
}

# Each method's own group in TrlOptions.
METHOD_OPTIONS: dict[MethodName, str] = {"dpo": "dpo", "supervised": "sft", "kto": "kto", "reward": "reward"}


class Options(BaseModel):
    """Base of all option groups: unknown keys are refused, values are frozen, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraOptions(Options):
    """The low-rank adapter that is trained when ``tuning`` is "lora"."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank of the update matrices.")
    alpha: float = Field(default=32, gt=0, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapter, a probability.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="Names of the adapted modules, or every linear layer but the output head."
    )
    use_dora: bool = Field(default=False, description="Weight-decomposed LoRA (DoRA).")
    quantization: QuantizationName | None = Field(
        default=None,
        description="Keep the base model's linear layers in 4 bits (QLoRA) or in 8, by bitsandbytes: less memory, and "
        "another base model than the unquantized one, so other numbers. Default: float32.",
    )


class OptimizerOptions(Options):
    name: Literal["adamw", "adam", "sgd"] = Field(
        default="adamw", description="adam is AdamW with weight decay 0; sgd has no momentum."
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Peak learning rate. Default: 1e-6 for dpo and kto, 2e-5 for supervised, 1e-5 for reward; ten "
        "times that for LoRA; times learning_rate_multiplier.",
    )
    weight_decay: float | None = Field(
        default=None, ge=0, description="Decoupled weight decay. Default: 0.01, and 0 for adam, which has none."
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this L2 norm.")

    @model_validator(mode="after")
    def _adam_has_no_decay(self) -> "OptimizerOptions":
        if self.name == "adam" and self.weight_decay:
            raise ValueError(
                f"adam has no weight decay, and {self.weight_decay} is asked for: use adamw, or weight_decay 0"
            )
        return self

    @property
    def decay(self) -> float:
        """The weight decay that is used; 0.01 is PyTorch's default for AdamW."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.0 if self.name == "adam" else 0.01


class SchedulerOptions(Options):
    name: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear", description="Shape of the learning rate after warm-up."
    )
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1, description="Warm-up as a fraction of all steps.")
    warmup_steps: int | None = Field(default=None, ge=0, description="Warm-up in steps; overrides warmup_ratio.")


class DpoOptions(Options):
    """Details of the DPO objective; names and meanings as in ``trl.DPOConfig``."""

    loss_type: list[LossType] = Field(default=["sigmoid"], min_length=1, description="One loss, or several summed.")
    loss_weights: list[float] | None = Field(default=None, description="A weight per loss; default 1.0 each.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="Probability that a label is flipped.")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        default="reverse_kl", description="How the policy is kept near the reference model (f-DPO)."
    )
    f_alpha_divergence_coef: float = Field(default=0.5, description="Coefficient of alpha_divergence.")
    ld_alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Length desensitisation (LD-DPO): weight of what the longer reply has more. Default: off.",
    )
    discopop_tau: float = Field(default=0.05, gt=0, description="Temperature of the discopop loss.")
    use_weighting: bool = Field(default=False, description="Weight pairs by policy probability (WPO).")
    truncation_mode: Literal["keep_start", "keep_end"] = Field(
        default="keep_start",
        description="What stays of a sequence longer than max_length. With keep_start, pairs whose prompt alone fills "
        "it are left out.",
    )
    precompute_ref_log_probs: bool | None = Field(
        default=None,
        description="Score the data with the reference model once, before training. Default: where that pays, in full "
        "fine-tuning from one epoch on, with LoRA from two.",
    )
    packing: bool = Field(
        default=True,
        description="Compute each pair once, without padding, where the model allows it: the same numbers, faster.",
    )
    max_row_tokens: int | None = Field(
        default=None, ge=1, description="Tokens computed at a time when packing. Default: as memory allows."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "DpoOptions":
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} values for {len(self.loss_type)} loss types: give one each"
            )
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise ValueError("loss_type exo_pair needs label_smoothing greater than 0 (its paper uses 0.001)")
        if self.use_weighting and {"aot", "aot_unpaired"} & set(self.loss_type):
            raise ValueError("use_weighting does not combine with the aot losses: they sort the pairs")
        needs_difference = {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"}
        if self.f_divergence_type != "reverse_kl" and needs_difference & set(self.loss_type):
            raise ValueError(
                f"f_divergence_type {self.f_divergence_type} has no valid form for loss_type "
                f"{sorted(needs_difference & set(self.loss_type))}: use reverse_kl"
            )
        return self


class SftOptions(Options):
    """Details of supervised fine-tuning; names and meanings as in ``trl.SFTConfig``."""

    completion_only_loss: bool = Field(
        default=True,
        description="Learn completions and the assistant's messages only; false: every token of a row.",
    )
    loss_type: Literal["nll", "dft"] = Field(
        default="nll", description="Negative log-likelihood, or dynamic fine-tuning (arXiv 2508.05629)."
    )
    packing: bool = Field(
        default=False,
        description="Put several rows into one sequence of up to max_length tokens, without padding; they do not see "
        "each other. batch_size then counts sequences.",
    )


class KtoOptions(Options):
    """Details of the KTO objective; names and meanings as in ``trl.KTOConfig``."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        default="kto", description="The loss of the KTO paper, or the unpaired variant of APO-zero."
    )
    desirable_weight: float = Field(default=1.0, gt=0, description="Weight of the losses of good completions.")
    undesirable_weight: float = Field(default=1.0, gt=0, description="Weight of the losses of bad completions.")
    precompute_ref_log_probs: bool = Field(
        default=False, description="Score the data with the reference model once, before training."
    )


class RewardOptions(Options):
    """Details of reward models; names and meanings as in ``trl.RewardConfig``."""

    center_rewards_coefficient: float | None = Field(
        default=None,
        gt=0,
        description="Weight of a loss that keeps rewards around zero (arXiv 2312.09244 has 0.01). Default: off.",
    )


class EarlyStoppingOptions(Options):
    """Ends the training when evaluations stop getting better."""

    patience: int = Field(default=3, ge=1, description="Evaluations in a row that may be no better than the best.")
    min_delta: float = Field(default=0.0, ge=0, description="By more than this the metric must be better to count.")


class EvaluationOptions(Options):
    """When the validation file is scored. Without a validation file and without ``split`` nothing is."""

    strategy: Literal["epoch", "steps", "end", "none"] = Field(
        default="epoch", description="When to evaluate while training; the last step is always evaluated unless none."
    )
    steps: int = Field(default=100, ge=1, description="Optimizer steps between evaluations (strategy steps).")
    before_training: bool = Field(default=True, description="Also evaluate before the first step.")
    split: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Fraction of the training rows held out when no validation file is given.",
    )
    batch_size: int | None = Field(default=None, ge=1, description="Rows per forward pass. Default: batch_size.")
    max_steps: int | None = Field(default=None, ge=1, description="Most batches scored in one evaluation.")
    metric: str = Field(
        default="loss",
        min_length=1,
        max_length=64,
        description="What evaluations are compared by, under TRL's name: the best one's checkpoint is kept and named.",
        examples=["rewards/accuracies"],
    )
    greater_is_better: bool | None = Field(
        default=None, description="Whether a greater value of the metric is better. Default: known from its name."
    )
    early_stopping: EarlyStoppingOptions | None = Field(
        default=None, description="End the training when evaluations stop getting better. Default: never."
    )

    @model_validator(mode="after")
    def _early_stopping_evaluates(self) -> "EvaluationOptions":
        if self.early_stopping is not None and self.strategy not in ("epoch", "steps"):
            raise ValueError(
                f"early_stopping needs evaluations while training, and strategy {self.strategy} makes none: "
                "use epoch or steps"
            )
        return self


class SavingOptions(Options):
    strategy: Literal["epoch", "steps", "end"] = Field(
        default="epoch", description="When to save a checkpoint; one is always saved at the end."
    )
    steps: int = Field(default=100, ge=1, description="Optimizer steps between checkpoints (strategy steps).")
    best: bool = Field(
        default=False, description="Also save after each evaluation that is the best so far (evaluation.metric)."
    )
    total_limit: int = Field(
        default=3, ge=1, description="Newest checkpoints kept, and the best one; others are deleted."
    )


class LoggingOptions(Options):
    steps: int = Field(default=1, ge=1, description="Optimizer steps between metrics events.")


# Without NUL, which PostgreSQL has no text with.
ClientId = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00]*$")]


class TrlOptions(Options):
    """Everything TRL-specific a job may say; the ``trl`` object of a create request. Unknown keys are refused."""

    client_id: ClientId | None = Field(
        default=None, description="The caller's own id of the job: submitting it again returns the same job."
    )
    priority: int = Field(default=0, ge=-100, le=100, description="Higher runs first; equal priorities by age.")
    devices: int = Field(
        default=1, ge=1, le=1024, description="GPUs (or CPU slots) the job needs. batch_size is divided among them."
    )
    distribution: Literal["auto", "ddp", "fsdp", "deepspeed"] = Field(
        default="auto",
        description="How several devices share the training. ddp: each holds the whole model; fsdp: each holds a part "
        "of it (FSDP2); deepspeed: ZeRO-3, where DeepSpeed is installed. auto: ddp where the model fits one device, "
        "else fsdp.",
    )

    max_run_seconds: float | None = Field(
        default=None, gt=0, description="Stop and fail the job after this much running time, over all its attempts."
    )

    tuning: Literal["lora", "full"] = Field(default="lora", description="Train an adapter or all weights.")
    lora: LoraOptions = LoraOptions()
    max_length: int = Field(
        default=2048,
        ge=2,
        description="Tokens of prompt plus reply; longer rows are truncated, and left out of reward.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="auto: bf16 on GPUs that have it, fp32 on CPU."
    )
    tf32: bool = Field(
        default=False,
        description="Compute float32 matrix products of an NVIDIA GPU in TF32: much faster, with factors of 10 bits "
        "after the point in place of 23. For fp32; bf16 and fp16 gain little.",
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Batches of batch_size rows per optimizer step."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, about a third slower."
    )
    check_memory: bool = Field(
        default=True,
        description="Refuse the job when its weights, gradients and optimizer alone cannot fit on the device.",
    )
    activation_offloading: bool = Field(default=False, description="Keep activations in host memory.")
    shuffle: bool = Field(default=True, description="Shuffle the rows each epoch, by seed.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many optimizer steps in all.")
    max_steps_per_epoch: int | None = Field(
        default=None, ge=1, description="Cap on the optimizer steps that count as one epoch."
    )
    optimizer: OptimizerOptions = OptimizerOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    dpo: DpoOptions = Field(default=DpoOptions(), description="Of the method dpo only.")
    sft: SftOptions = Field(default=SftOptions(), description="Of the method supervised only.")
    kto: KtoOptions = Field(default=KtoOptions(), description="Of the method kto only.")
    reward: RewardOptions = Field(default=RewardOptions(), description="Of the method reward only.")
    evaluation: EvaluationOptions = EvaluationOptions()
    saving: SavingOptions = SavingOptions()
    logging: LoggingOptions = LoggingOptions()

    def of_other_methods(self, method: MethodName) -> list[str]:
        """The groups that belong to other methods and say something else than their defaults."""
        defaults = TrlOptions()
        groups = [group for name, group in METHOD_OPTIONS.items() if name != method]
        return [group for group in groups if getattr(self, group) != getattr(defaults, group)]


Distribution = Literal["ddp", "fsdp", "deepspeed"]


class TrainingSpec(BaseModel):
    """The resolved specification of one job, as ``spec.json`` in its run directory holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    job_id: str
    method: MethodName
    model: str = Field(description="The base model as the user named it.")
    model_path: str | None = Field(description="Local folder of the base model; None: load it from the hub by name.")
    training_file: str = Field(description="Path of the training data.")
    validation_file: str | None
    reference_cache: str | None = Field(
        default=None, description="Folder of reference log-probabilities that jobs share; None: they are not kept."
    )
    seed: int = Field(ge=0, lt=2**32)
    beta: float | None = Field(gt=0, description="None for a method that has none.")
    batch_size: int = Field(ge=1, description="Rows per forward pass, of all devices together.")
    n_epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    device: Literal["auto", "cuda", "cpu", "mps"]
    distribution: Distribution | None = Field(
        default=None, description="How several devices share the training; None: one process trains."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the base model's own Python code. Decided by the operator at each launch."
    )
    options: TrlOptions

    @property
    def ranks(self) -> int:
        """Processes that train, each on a device of its own."""
        return 1 if self.distribution is None else self.options.devices

    @property
    def is_evaluated(self) -> bool:
        """Whether there are rows to evaluate on, and they are wanted."""
        evaluation = self.options.evaluation
        return evaluation.strategy != "none" and (self.validation_file is not None or evaluation.split > 0)
