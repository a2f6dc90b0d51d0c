"""What one measurement is: as typed, and as its ranks read it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

CONFIG_FILE = "config.toml"
SETTINGS_FILE = "settings.json"
RESULT_FILE = "result.json"

FUSED, MATERIALISED = "fused", "materialised"


@dataclass(frozen=True)
class StepSettings:
    """One measurement of one stage's step."""

    stage: str
    size: str
    device: str  # "cuda" or "cpu", resolved
    ranks: int
    sequence_length: int
    steps: int
    warmup: int
    attention: str
    # How logits are had: FUSED, a chunk at a time by the kernels, or MATERIALISED, all at once in plain torch.
    logits: str = FUSED
    peak_tflops: float | None = None
    divide: bool = True  # whether there is a second pass, which tells where the time goes
    # Whether steps are also taken without the reference, its losses at hand; or all of them, and it is not there.
    compare_scores: bool = False
    only_scores: bool = False

    def write(self, folder: Path) -> None:
        """Hand them to the ranks."""
        (folder / SETTINGS_FILE).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "StepSettings":
        """The inverse of :meth:`write`."""
        return cls(**json.loads((folder / SETTINGS_FILE).read_text()))
