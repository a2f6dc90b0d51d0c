"""A model that has learned three solutions by heart, of which one is wrong."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import get_template
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.models.loading import load_policy, load_tokenizer, save_weights
from wmtp_ds.models.micro import make_micro_models

PROBLEMS = [
    ("double", "Double a number.", "def double(x):\n    return 2 * x\n", ["assert double(3) == 6"], True),
    ("last", "Last item of a list.", "def last(xs):\n    return xs[-1]\n", ["assert last([1, 2]) == 2"], True),
    ("negate", "Negate a number.", "def negate(x):\n    return x\n", ["assert negate(1) == -1"], False),
]


@pytest.fixture(scope="session")
def solved_problems() -> list[tuple[str, str, str, list[str], bool]]:
    """Id, instruction, what the model answers, tests, and whether it passes them."""
    return PROBLEMS


@pytest.fixture(scope="session")
def problems_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with tests; the wrong solution is marked so, and a right one of its problem follows."""
    rows = [
        {
            "problem_id": name,
            "instruction": instruction,
            "output": output,
            "is_correct": is_correct,
            "metadata": {"tests": tests},
        }
        for name, instruction, output, tests, is_correct in PROBLEMS
    ]
    rows.append(rows[2] | {"output": "def negate(x):\n    return -x\n", "is_correct": True})
    file = tmp_path_factory.mktemp("problems") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def solver(tmp_path_factory: pytest.TempPathFactory, problems_file: Path) -> Path:
    """A model's folder: all four heads know the three solutions."""
    root = tmp_path_factory.mktemp("solver")
    folder = root / "policy"
    make_micro_models(data=problems_file, policy=folder, reference=root / "reference", trunk_layers=1, vocab_size=300)
    policy, encoder = load_policy(folder), TextEncoder(load_tokenizer(folder))
    sequences = []
    for name, instruction, output, _, _ in PROBLEMS:
        row = Row(problem_id=name, instruction=instruction, output=output, is_correct=True)
        prompt, solution = encoder([get_template("alpaca")(row), output])
        sequences.append(([encoder.bos_id, *prompt], [*solution, encoder.eos_id]))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(120):
        losses = []
        for prompt, solution in sequences:
            tokens = torch.tensor([prompt + solution])
            states = policy.head_states(policy.trunk(tokens))
            for head in range(policy.n_future_tokens):
                logits = policy.lm_head(states[head])[0, len(prompt) - head - 1 : -head - 1]
                losses.append(F.cross_entropy(logits, tokens[0, len(prompt) :]))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, "it has not learned them"
    save_weights(policy, folder)
    return folder
