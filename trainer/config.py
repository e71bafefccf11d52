"""What can be chosen about training?"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shards.settings import Settings

__all__ = ["TrainerSettings", "TransferSettings"]


class TrainerSettings(Settings):
    """How the committee is fitted to its labels."""

    ranks: int = Field(default=2, ge=1)
    """Horovod ranks; each does its share of every batch. The result depends on their number only by rounding."""
    batch: int = Field(default=128, ge=1)
    """Structures per step, over all ranks together. Published: 128 cells for 6,351."""
    steps_per_epoch: int = Field(default=8, ge=1)
    """Fewest steps per epoch: a small data set is cut into smaller batches until it has so many."""
    learning_rate: float = Field(default=3e-3, gt=0, le=0.1)
    """First step size of Adam, of every member. Published: 1e-3, which wants some hundred epochs more."""
    factor: float = Field(default=0.5, gt=0, lt=1)
    """A member's learning rate is multiplied by this when its validation loss has stopped falling."""
    patience: int = Field(default=100, ge=1)
    """Epochs without a better validation loss before a member's learning rate drops. Published: 100."""
    min_learning_rate: float = Field(default=1e-5, gt=0)
    """A member is finished once its learning rate falls below this."""
    max_epochs: int = Field(default=2000, ge=1)
    """Stop after so many epochs at the latest."""
    max_minutes: float = Field(default=0.0, ge=0)
    """Stop after so many minutes (interruptions not counted), with the best weights until then. 0: no limit."""
    energy_weight: float = Field(default=1.0, ge=0)
    """Weight of (energy error)^2 / n_atoms, eV^2. Per atom, not per atom squared: so cells of all sizes count alike."""
    force_weight: float = Field(default=3.0, ge=0)
    """Weight of the mean square error of force components, in A^2. From 0.1 to 3 all errors fall; 10 costs energies."""
    stress_weight: float = Field(default=0.1, ge=0)
    """Weight of the mean over six components of (volume * stress error)^2 / n_atoms, eV^2."""
    force_cap_eV_per_A: float = Field(default=1.0, gt=0)
    """Force errors beyond this count linearly, not squared (Huber), so that a few colliding atoms do not rule."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """Where the networks are trained: cpu, cuda:1, ..., or cuda: each rank of a node takes the next of its GPUs.
    Descriptors and their derivatives lie there, too."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the networks while training. float64 costs about twice as much."""
    warm_start: bool = False
    """Begin from the committee the caller names (the last generation's) instead of from random weights."""
    energy_outlier_sigma: float = Field(default=9.0, gt=0)
    """Leave out cells whose energy / sqrt(n_atoms) is so many standard deviations off the rest. Published: 9."""
    max_force_eV_per_A: float = Field(default=50.0, gt=0)
    """Leave out cells with a larger force component. Published tools: 54 (2 Ha/A)."""
    jacobian_memory_GB: float = Field(default=4.0, ge=0)
    """Memory, over all ranks, for derivatives of the descriptors; a set that needs more recomputes them. 0: always, as
    on a GPU, which makes them anew in less time than it would read them."""
    memory_share: float = Field(default=0.5, ge=0, le=1)
    """Share of a node's memory, or of that of the GPUs which train, to keep structures, descriptors and derivatives in.
    What a larger set lacks is made anew for every step: derivatives first; then structures are streamed from their
    shards. 0: nothing kept."""
    checkpoint_every_s: float = Field(default=30.0, ge=0)
    """Seconds between checkpoints; written at the end of an epoch. 0: every epoch."""


class TransferSettings(Settings):
    """How a trained committee is carried to a higher level of theory; what is not said here is as in training. The
    defaults are those of ANI-1ccx."""

    freeze: tuple[str, ...] = ("hidden1", "hidden3")
    """Layers whose weights stay as they are, bit by bit: "hidden1", "hidden2", ... and "output", of every element.
    Published: the first and the third, so that a fifth of the weights is trained again."""
    rate_factors: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Factors on the learning rate of single layers, such as { hidden2 = 0.1 }; 1 where none is named."""
    forces: Literal["labels", "distilled", "replayed"] = "labels"
    """Forces to learn from on frames whose labels have none. "labels": none, energies alone. "distilled": those of the
    committee to start from. "replayed": labels of the lower level on the same frames. Borrowed forces hold the slopes
    while energies are few, and hold back what the higher level knows better; validation never looks at them."""
    learning_rate: float = Field(default=1e-3, gt=0, le=0.1)
    """First step size of Adam."""
    patience: int = Field(default=200, ge=1)
    """Epochs without a better validation loss before a member's learning rate drops. Published: 200."""
    min_learning_rate: float = Field(default=1e-6, gt=0)
    """A member is finished once its learning rate falls below this. Published: 1e-6."""
    max_epochs: int = Field(default=4000, ge=1)
    """Stop after so many epochs at the latest."""

    def apply_to(self, settings: TrainerSettings) -> TrainerSettings:
        """The settings of the training that a transfer is."""
        names = ("learning_rate", "patience", "min_learning_rate", "max_epochs")
        return settings.model_copy(update={name: getattr(self, name) for name in names} | {"warm_start": True})
