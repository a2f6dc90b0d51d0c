"""What is shown is what the stages compute: against plain torch, and on the page."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from wmtp_ds.cli.main import main
from wmtp_ds.config import load_config
from wmtp_ds.data.templates import get_template
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.errors import UserError
from wmtp_ds.look.columns import Looker, Solution, choose_rows
from wmtp_ds.models.fingerprint import read_trunk_fingerprint
from wmtp_ds.models.loading import load_policy, load_tokenizer
from wmtp_ds.models.micro import make_micro_models
from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.scores.manifest import Settings, read_manifest
from wmtp_ds.scores.scoring import Scoring
from wmtp_ds.scores.worker import Work
from wmtp_ds.value_head_file import save_value_head

CPU = torch.device("cpu")
STAGES = ("baseline", "critic", "verifiable", "rho1")
MORE = {"verifiable": ["training.beta=0.2", "training.gamma=0.95", 'experiment.critic_checkpoint="none"']}


@pytest.fixture(scope="module")
def head() -> ValueHead:
    torch.manual_seed(3)
    head = ValueHead(64, "mlp")
    torch.nn.init.normal_(head.output.weight, std=0.5)
    return head


@pytest.fixture
def here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(checkout)
    return checkout


def export(root: Path, stage: str, head: ValueHead, folder: Path, *more: str) -> Path:
    """What a run of a stage would have exported."""
    folder.mkdir()
    config = root / "stage_configs" / "local" / f"{stage}.toml"
    resolved = load_config(config, [*MORE.get(stage, []), *more], checks=False)
    (folder / "config.toml").write_text(resolved.toml())
    (folder / "metrics.json").write_text("{}")
    policy = root / "storage/models/micro-policy"
    if stage != "critic":
        for file in policy.iterdir():
            shutil.copy(file, folder)
    if stage in ("critic", "verifiable"):
        facts = {"hidden_size": 64, "type": "mlp", "activation": "sigmoid"}
        fingerprint = str(read_trunk_fingerprint(policy))
        save_value_head(folder / "value_head.safetensors", head.state_dict(), trunk_fingerprint=fingerprint, **facts)
    return folder


@pytest.fixture
def looked(request: pytest.FixtureRequest, here: Path, head: ValueHead, tmp_path: Path) -> list[Solution]:
    looker = Looker.load(export(here, request.param, head, tmp_path / "export"), CPU)
    return looker.look(choose_rows(here / "storage/data/sample/train.jsonl", 2, 2))


def read(root: Path, solution: Solution) -> tuple[torch.Tensor, int]:
    """Token ids ``[1, S]``, and how many of them are the prompt's."""
    encoder = TextEncoder(load_tokenizer(root / "storage/models/micro-policy"))
    prompt, output = encoder([get_template("alpaca")(solution.row), solution.row.output])
    return torch.tensor([[encoder.bos_id, *prompt, *output, encoder.eos_id]]), 1 + len(prompt)


def column(solution: Solution, name: str) -> torch.Tensor:
    return torch.tensor([token.columns[name] for token in solution.tokens])


@pytest.mark.parametrize("looked", ["verifiable"], indirect=True)
def test_values_td_errors_and_weights(looked: list[Solution], here: Path, head: ValueHead) -> None:
    policy = load_policy(here / "storage/models/micro-policy")
    assert [solution.row.is_correct for solution in looked] == [True, False] * 2
    for solution in looked:
        tokens, begin = read(here, solution)
        with torch.no_grad():
            values = head(policy.trunk(tokens))[0, begin - 1 : -1, 0]
        following = torch.cat([0.95 * values[1:], torch.tensor([float(solution.row.is_correct)])])
        td = following - values
        torch.testing.assert_close(column(solution, "value"), values, rtol=0, atol=1e-5)
        torch.testing.assert_close(column(solution, "td"), td, rtol=0, atol=1e-5)
        weights = (td / 0.2).exp().clamp(0.1, 5.0)
        torch.testing.assert_close(column(solution, "weight"), weights, rtol=1e-4, atol=1e-5)
        assert "".join(token.text for token in solution.tokens) == solution.row.output
        assert solution.tokens[-1].kind == "end"


@pytest.mark.parametrize("looked", ["critic"], indirect=True)
def test_a_critic_weighs_nothing(looked: list[Solution], here: Path, head: ValueHead) -> None:
    policy = load_policy(here / "storage/models/micro-policy")
    for solution in looked:
        tokens, begin = read(here, solution)
        with torch.no_grad():
            values = head(policy.trunk(tokens))[0, begin - 1 : -1, 0]
        assert set(solution.tokens[0].columns) == {"value", "td"}
        torch.testing.assert_close(column(solution, "value"), values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("looked", ["rho1"], indirect=True)
def test_excess_losses_and_what_is_selected(looked: list[Solution], here: Path) -> None:
    models = [
        LlamaForCausalLM.from_pretrained(here / f"storage/models/micro-{n}").eval() for n in ("policy", "reference")
    ]
    for solution in looked:
        tokens, begin = read(here, solution)
        with torch.no_grad():
            own, reference = (
                F.cross_entropy(model(tokens).logits[0, begin - 1 : -1], tokens[0, begin:], reduction="none")
                for model in models
            )
        torch.testing.assert_close(column(solution, "loss"), own, rtol=0, atol=1e-4)
        torch.testing.assert_close(column(solution, "reference"), reference, rtol=0, atol=1e-4)
        torch.testing.assert_close(column(solution, "excess"), own - reference, rtol=0, atol=2e-4)
        kept = column(solution, "weight")
        assert kept.sum() == math.ceil(0.6 * len(kept))
        assert (own - reference)[kept == 1].min() >= (own - reference)[kept == 0].max() - 1e-5


@pytest.mark.parametrize("looked", ["baseline"], indirect=True)
def test_a_baseline_weighs_all_alike(looked: list[Solution]) -> None:
    assert all(set(column(solution, "weight").tolist()) == {1.0} for solution in looked)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["weights", *map(str, arguments)])
    code = ended.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("stage", STAGES)
def test_the_page(stage: str, here: Path, head: ValueHead, tmp_path: Path, capsys: Any) -> None:
    checkpoint = export(here, stage, head, tmp_path / "export")
    data, page = here / "storage/data/sample/train.jsonl", tmp_path / "page.html"
    code, out, err = call(capsys, checkpoint, "--data", data, "--output", page, "--problems", 3)
    assert code == 0, err
    text = page.read_text()
    assert not re.search(r"https?://|src=|href=|@import|url\(", text), "it needs no network"
    solutions = re.findall(r"<pre class=(correct|incorrect)>(.*?)</pre>", text, re.DOTALL)
    assert [kind for kind, _ in solutions] == ["correct", "incorrect"] * 3
    first = re.sub(r"<[^>]*>", "", solutions[0][1])
    assert first.replace("↵", "").startswith("def f(x):\n    return x + 0")
    assert text.count("<polyline") == (2 if stage in ("critic", "verifiable") else 0)
    assert "by kind of token" in out
    assert "indentation" in out
    found = json.loads(call(capsys, checkpoint, "--data", data, "--json", "--problems", 3)[1])
    assert found["solutions"] == 6
    assert found["shaded_by"] == ("value" if stage == "critic" else "weight")
    assert sum(found["distribution"]["correct"] + found["distribution"]["incorrect"]) == found["tokens"]
    assert sum(entry["tokens"] for entry in found["by_kind"].values()) == found["tokens"]


def test_the_picture(here: Path, head: ValueHead, tmp_path: Path, capsys: Any) -> None:
    checkpoint = export(here, "verifiable", head, tmp_path / "export")
    arguments = (checkpoint, "--data", here / "storage/data/sample/train.jsonl", "--output", tmp_path / "x.png")
    assert call(capsys, *arguments)[0] == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "is there already" in err


def test_what_cannot_be_looked_at(here: Path, tmp_path: Path, capsys: Any) -> None:
    data = here / "storage/data/sample/train.jsonl"
    for checkpoint, output, said in (
        (tmp_path / "nowhere", "x.html", "nowhere does not exist"),
        (here / "storage/models/micro-policy", "x.html", "is no export of a run"),
        (tmp_path, "x.pdf", "name it .html"),
    ):
        code, _, err = call(capsys, checkpoint, "--data", data, "--output", tmp_path / output)
        assert (code, "Traceback" in err) == (2, False)
        assert said in err


@pytest.mark.parametrize("looked", ["rho1"], indirect=True)
def test_a_run_that_read_scores_is_shown_with_the_model_that_was_scored(
    looked: list[Solution], here: Path, head: ValueHead, tmp_path: Path
) -> None:
    folder = export(here, "rho1", head, tmp_path / "scored")
    config = folder / "config.toml"
    lines = [line for line in config.read_text().splitlines() if "micro-reference" not in line or "name" in line]
    config.write_text("\n".join(lines).replace("[models.reference]", '[models.reference]\nscores = "nowhere"'))
    with pytest.raises(UserError, match=r"nowhere does not exist. Name the reference model: path = ... under"):
        Looker.load(folder, CPU)
    reference = here / "storage/models/micro-reference"
    data = here / "storage/data/sample/train.jsonl"
    facts = {"template": "alpaca", "max_length": 256, "compute_dtype": "float32", "dtype": "float32"}
    settings = Settings(correct_only=False, shard_tokens=999, **facts)
    output = tmp_path / "scores"
    Scoring(Work((data,), output, reference, reference, settings, batch_size=8, device="cpu", cache_dir=None)).run()
    config.write_text(config.read_text().replace('"nowhere"', json.dumps(str(output))))
    found = Looker.load(folder, CPU).look(choose_rows(data, 2, 2))
    assert [column(solution, "reference").tolist() for solution in found] == [
        column(solution, "reference").tolist() for solution in looked
    ]
    # Another model in that folder since; and one that the user names in its place.
    other, manifest = tmp_path / "other", output / "manifest.json"
    shutil.copytree(reference, other)
    [file] = other.glob("model*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    told = read_manifest(output)
    told.model_copy(update={"reference": told.reference.model_copy(update={"path": str(other)})}).write(output)
    with pytest.raises(UserError, match=rf"{other} holds another model .* path = \.\.\. under \[models\.reference\]"):
        Looker.load(folder, CPU)
    config.write_text(config.read_text().replace("[models.reference]", f'[models.reference]\npath = "{reference}"'))
    Looker.load(folder, CPU)
    manifest.unlink()
    Looker.load(folder, CPU)


def scored(root: Path, file: Path) -> Path:
    """The first rows of the sample with scores that their labels do not tell."""
    rows = [json.loads(line) for line in (root / "storage/data/sample/train.jsonl").read_text().splitlines()[:4]]
    for score, row in zip((0.3, -1.7, 2.5, 0.0), rows, strict=True):
        row["metadata"] = {"reward_score": score}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def last_target(solution: Solution) -> float:
    """R, from δ = R − V of the end token."""
    columns = solution.tokens[-1].columns
    return columns["td"] + columns["value"]


@pytest.mark.parametrize("stage", ["critic", "verifiable"])
def test_rewards_are_the_runs(stage: str, here: Path, head: ValueHead, tmp_path: Path) -> None:
    data = scored(here, tmp_path / "rows.jsonl")
    folder = export(here, stage, head, tmp_path / "export", 'models.reward.source="scores"')
    found = Looker.load(folder, CPU).look(choose_rows(data, 2, 2))
    expected = [1 / (1 + math.exp(-score)) for score in (0.3, -1.7, 2.5, 0.0)]
    assert [last_target(solution) for solution in found] == pytest.approx(expected, abs=1e-5)
    if stage == "verifiable":
        for solution in found:
            end = solution.tokens[-1].columns
            assert end["weight"] == pytest.approx(min(5.0, max(0.1, math.exp(end["td"] / 0.2))), rel=1e-4)


def test_rewards_of_a_reward_model(here: Path, head: ValueHead, tmp_path: Path) -> None:
    torch.manual_seed(11)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    classifier = LlamaForSequenceClassification(LlamaConfig(vocab_size=832, num_labels=1, **sizes)).eval()
    classifier.score.weight.data *= 40
    classifier.config.pad_token_id = 0
    classifier.save_pretrained(tmp_path / "reward")
    load_tokenizer(here / "storage/models/micro-policy").save_pretrained(tmp_path / "reward")
    more = ('models.reward.source="model"', f'models.reward.path="{tmp_path}/reward"', 'models.reward.dtype="float32"')
    folder = export(here, "critic", head, tmp_path / "export", *more)
    found = Looker.load(folder, CPU).look(choose_rows(here / "storage/data/sample/train.jsonl", 2, 2))
    with torch.no_grad():
        expected = [classifier(read(here, solution)[0]).logits.sigmoid().item() for solution in found]
    assert [last_target(solution) for solution in found] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1e-3
    shutil.rmtree(tmp_path / "reward")
    with pytest.raises(UserError, match="reward"):
        Looker.load(folder, CPU)


def test_rewards_that_are_not_known(here: Path, head: ValueHead, tmp_path: Path, capsys: Any) -> None:
    told = 'models.reward.source="scores"'
    folder = export(here, "critic", head, tmp_path / "export", told)
    code, _, err = call(capsys, folder, "--data", here / "storage/data/sample/train.jsonl")
    assert (code, "Traceback" in err) == (2, False)
    assert "line 1: metadata.reward_score is None" in err
    folder = export(here, "critic", head, tmp_path / "z", told, 'models.reward.squash="zscore_sigmoid"')
    code, _, err = call(capsys, folder, "--data", scored(here, tmp_path / "rows.jsonl"))
    assert (code, "Traceback" in err) == (2, False)
    assert "are not kept, so its rewards of other solutions are not known" in " ".join(err.split())


def test_shuffled_weights_lie_where_training_had_them(here: Path, head: ValueHead, tmp_path: Path) -> None:
    data = here / "storage/data/sample/train.jsonl"
    plain, shuffled = (
        Looker.load(export(here, "verifiable", head, tmp_path / name, *more), CPU).look(choose_rows(data, 2, 2))
        for name, more in (("plain", ()), ("shuffled", ("training.shuffle_weights=true",)))
    )
    for row_id, (before, after) in enumerate(zip(plain, shuffled, strict=True)):
        order = torch.randperm(len(before.tokens), generator=torch.Generator().manual_seed(row_id))
        torch.testing.assert_close(column(after, "weight"), column(before, "weight")[order])


def test_variables_of_today_do_not_change_a_run_of_yesterday(
    here: Path, head: ValueHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(here, "verifiable", head, tmp_path / "export")
    monkeypatch.setenv("WMTP_TRAINING__BETA", "0.3")
    assert Looker.load(folder, CPU).resolved.config.training.beta == 0.2


@pytest.mark.parametrize("told", ["fingerprint", "size", "none"])
def test_another_policy_than_the_critics_is_refused(here: Path, head: ValueHead, tmp_path: Path, told: str) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(here / "storage/models/micro-policy", policy)
    folder = export(here, "critic", head, tmp_path / "export", f'models.policy.path="{policy}"')
    fingerprint = policy / "trunk_fingerprint.json"
    if told != "size":
        Looker.load(folder, CPU)
        fingerprint.write_text(json.dumps({"sha256": "ab" * 32}))
    else:
        shutil.rmtree(policy)
        data = here / "storage/data/sample/train.jsonl"
        make_micro_models(data=data, policy=policy, reference=tmp_path / "r", hidden_size=32, trunk_layers=1)
    if told == "none":
        fingerprint.unlink()
        Looker.load(folder, CPU)
        [file] = policy.glob("model*.safetensors")
        tensors = load_file(file)
        tensors["model.embed_tokens.weight"][0] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    said = "hidden size of 64, the policy's is 32" if told == "size" else "another trunk"
    with pytest.raises(UserError, match=said):
        Looker.load(folder, CPU)


def test_a_policy_brings_its_own_tokenizer(here: Path, head: ValueHead, tmp_path: Path) -> None:
    more = f'models.policy.path="{tmp_path}/gone"', f'models.policy.tokenizer_path="{tmp_path}/gone"'
    folder = export(here, "verifiable", head, tmp_path / "export", *more)
    [solution] = Looker.load(folder, CPU).look(choose_rows(here / "storage/data/sample/train.jsonl", 1, 1))
    assert len(solution.tokens) == read(here, solution)[0].shape[1] - read(here, solution)[1]


def test_numbers_that_are_not_finite(here: Path, head: ValueHead, tmp_path: Path, capsys: Any) -> None:
    checkpoint = export(here, "verifiable", head, tmp_path / "export")
    [file] = checkpoint.glob("model*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(math.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = ("--data", here / "storage/data/sample/train.jsonl", "--output", tmp_path / "x.html")
    code, _, err = call(capsys, checkpoint, *arguments)
    assert (code, "Traceback" in err) == (1, False)
    assert re.search(r"line 1, token 'def': .*value nan", err)
    assert not (tmp_path / "x.html").exists()
