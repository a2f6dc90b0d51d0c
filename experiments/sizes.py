"""The sizes of the experiments: minutes on a CPU, with generated problems or MBPP, or a GPU."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Size:
    """Models, data and steps.

    Attributes:
        name: what it is called.
        configs: the folder of the stages' configs, below ``experiments``.
        device: "cpu" or "cuda".
        hidden_size, trunk_layers, vocab_size, heads: of the policy; other studies say where they have other heads.
        problems: that are generated, a tenth of them held out; 0: those of MBPP.
        difficulties: of the problems that are used, from and to.
        base_steps: optimizer steps before a critic can read the trunk.
        steps: of each arm that goes on from there.
        critic_steps: of the critic.
        corpus_steps, reference_steps: of the arms, and of the reference, of the study of corruption.
        heads_steps: of the model with the most heads, in the study of heads.
        evaluated: held-out problems, at most, that are solved for pass@1; 0: none, it is not measured.
        mbpp: the folder with MBPP's files.
    """

    name: str
    configs: str
    device: str
    hidden_size: int
    trunk_layers: int
    vocab_size: int
    heads: int
    problems: int
    difficulties: tuple[int, int]
    base_steps: int
    steps: int
    critic_steps: int
    corpus_steps: int
    reference_steps: int
    heads_steps: int
    evaluated: int
    mbpp: Path | None = None

    @property
    def folder(self) -> Path:
        """Where its data, models and runs are."""
        return Path("storage/experiments") / self.name

    def config(self, stage: str) -> Path:
        """The config that the runs of a stage begin with."""
        return Path("experiments") / self.configs / f"{stage}.toml"


SMALL = Size(
    name="small",
    configs="small",
    device="cpu",
    hidden_size=128,
    trunk_layers=3,
    vocab_size=1024,
    heads=2,
    problems=6600,
    difficulties=(1, 3),
    base_steps=800,
    steps=150,
    critic_steps=600,
    corpus_steps=200,
    reference_steps=500,
    heads_steps=300,
    evaluated=100,
)
LARGE = Size(
    name="large",
    configs="large",
    device="cuda",
    hidden_size=768,
    trunk_layers=10,
    vocab_size=8192,
    heads=4,
    problems=22_000,
    difficulties=(1, 11),
    base_steps=4000,
    steps=2000,
    critic_steps=1000,
    corpus_steps=2000,
    reference_steps=4000,
    heads_steps=4000,
    evaluated=500,
)
# So few problems that more steps would only learn them by heart; so short prompts that no solution can know its name.
MBPP = dataclasses.replace(
    SMALL, name="mbpp", problems=0, difficulties=(1, 11), base_steps=400, steps=100, critic_steps=200, corpus_steps=150,
    reference_steps=300, evaluated=0,
)  # fmt: skip
SIZES = {size.name: size for size in (SMALL, MBPP, LARGE)}
