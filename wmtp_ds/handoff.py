"""Hands a trained value head from one run to the next: found by path or MLflow URI, read without pickle.

A critic is given as

- a folder that holds ``value_head.safetensors``, itself or in ``checkpoint_best/``;
- that file, or a ``.pt`` with ``value_head_state_dict`` (read with ``weights_only``: code in it never runs);
- ``runs:/<run_id>/<path>``, ``mlflow-artifacts:/<path>``, or
  ``mlflow://<experiment_id>/<run_id>/artifacts/<path>``, where the path leads to such a folder or file.

What a file holds is :mod:`wmtp_ds.value_head_file`'s business; its functions are at hand here, too. torch and
MLflow are imported on use, so that the validator can call :func:`parse_critic_uri`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from wmtp_ds import mlflow_client
from wmtp_ds.errors import UserError
from wmtp_ds.value_head_file import (
    VALUE_HEAD_FILE,
    ValueHeadFile,
    check_value_head,
    load_value_head,
    read_value_head_metadata,
    save_value_head,
)

__all__ = [
    "VALUE_HEAD_FILE",
    "CriticUri",
    "ValueHeadFile",
    "check_value_head",
    "load_value_head",
    "locate_critic",
    "parse_critic_uri",
    "read_value_head_metadata",
    "save_value_head",
]

BEST_FOLDER = "checkpoint_best"

URI_FORMS = (
    "a folder with value_head.safetensors, that file, a .pt, runs:/<run_id>/<path>, mlflow-artifacts:/<path> "
    "or mlflow://<experiment_id>/<run_id>/artifacts/<path>"
)
_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,255}", re.ASCII)
_SCHEME = re.compile(r"(?P<scheme>runs|mlflow|mlflow-artifacts):(?P<rest>.*)|[A-Za-z][A-Za-z0-9+.-]+:/.*", re.DOTALL)


@dataclass(frozen=True)
class CriticUri:
    """Where a critic is: a local path, or an artifact in MLflow."""

    text: str
    kind: Literal["path", "runs", "mlflow-artifacts", "mlflow"]
    path: str  # local, or below the artifacts of the run, or of the server
    host: str = ""  # mlflow-artifacts://host/...
    run_id: str = ""
    experiment_id: str = ""

    @property
    def artifact_uri(self) -> str:
        """The URI as MLflow understands it (it has no scheme ``mlflow://``)."""
        if self.kind == "mlflow-artifacts":
            return f"mlflow-artifacts:{'//' + self.host if self.host else ''}/{self.path}"
        return f"runs:/{self.run_id}/{self.path}"


def parse_critic_uri(text: str) -> CriticUri:
    """Tell what ``text`` names, by its form alone: nothing is opened, no server is asked.

    Raises
    ------
    UserError
        An unknown scheme, a missing part, or a path that climbs out of its folder (``..``).
    """
    stripped = text.strip()
    if not stripped:
        raise UserError(f"the critic checkpoint is empty.\n  Mend: give {URI_FORMS}.")
    match = _SCHEME.fullmatch(stripped)
    if match is None:
        return CriticUri(text=text, kind="path", path=stripped)
    shown = mlflow_client.mask_secrets(stripped)
    scheme, rest = match["scheme"], match["rest"]
    if scheme is None:
        raise UserError(f"'{shown}' has a scheme that is not known here.\n  Mend: give {URI_FORMS}.")
    if any(mark in rest for mark in "?#@"):
        raise UserError(
            f"'{shown}' holds one of ? # @.\n  Mend: credentials belong into MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, and an artifact has no query."
        )
    if scheme == "runs":
        return _parse_runs(text, shown, rest)
    if scheme == "mlflow":
        return _parse_mlflow(text, shown, rest)
    return _parse_mlflow_artifacts(text, shown, rest)


def _parse_runs(text: str, shown: str, rest: str) -> CriticUri:
    run_id, _, path = rest.removeprefix("/").partition("/")
    form = "runs:/<run_id>/<path>, as in runs:/0123abcd/checkpoints/checkpoint_best"
    if not rest.startswith("/") or not _NAME.fullmatch(run_id) or not path:
        raise UserError(f"'{shown}' is no artifact of a run.\n  Mend: write {form}.")
    return CriticUri(text=text, kind="runs", path=_safe_path(shown, path), run_id=run_id)


def _parse_mlflow(text: str, shown: str, rest: str) -> CriticUri:
    parts = rest.removeprefix("//").split("/", 3)
    form = "mlflow://<experiment_id>/<run_id>/artifacts/<path>, as in mlflow://8/0123abcd/artifacts/checkpoints"
    named = len(parts) == 4 and _NAME.fullmatch(parts[0]) and _NAME.fullmatch(parts[1])
    if not rest.startswith("//") or not named or parts[2] != "artifacts" or not parts[3]:
        raise UserError(f"'{shown}' is no artifact of a run.\n  Mend: write {form}.")
    path = _safe_path(shown, parts[3])
    return CriticUri(text=text, kind="mlflow", path=path, run_id=parts[1], experiment_id=parts[0])


def _parse_mlflow_artifacts(text: str, shown: str, rest: str) -> CriticUri:
    host, path = "", rest.removeprefix("/")
    if rest.startswith("//"):
        host, _, path = rest[2:].partition("/")
    if not rest.startswith("/") or not path or (rest.startswith("//") and not re.fullmatch(r"[\w.:\[\]-]+", host)):
        raise UserError(
            f"'{shown}' names no artifact.\n  Mend: write mlflow-artifacts:/<path>, as in "
            "mlflow-artifacts:/8/0123abcd/artifacts/checkpoints/checkpoint_best."
        )
    return CriticUri(text=text, kind="mlflow-artifacts", path=_safe_path(shown, path), host=host)


def _safe_path(shown: str, path: str) -> str:
    """The path without a trailing slash; refused if it could lead out of its folder, encoded or not."""
    path = path.rstrip("/")
    decoded = path
    while (further := unquote(decoded)) != decoded:
        decoded = further
    segments = re.split(r"[/\\]", decoded)
    if not path or any(segment in ("", ".", "..") for segment in segments) or "\x00" in decoded:
        raise UserError(
            f"the path in '{shown}' has an empty segment, '.' or '..'.\n"
            "  Mend: write the path of the artifact as MLflow lists it."
        )
    return path


def locate_critic(uri: str, *, tracking_uri: str, cache_dir: Path) -> Path:
    """Return the local file that holds the value head; an artifact is downloaded into ``cache_dir``.

    Only the value head is downloaded, also from a checkpoint that holds a whole policy, and it appears in
    ``cache_dir`` whole or not at all.

    Raises
    ------
    UserError
        Nothing is there, MLflow cannot be reached, or the run is of another experiment than the URI says.
    """
    parsed = parse_critic_uri(uri)
    if parsed.kind == "path":
        return _locate_path(Path(parsed.path).expanduser())
    return _download(parsed, tracking_uri, cache_dir)


def _locate_path(path: Path) -> Path:
    if path.is_file():
        if path.suffix not in (".safetensors", ".pt"):
            raise UserError(f"{path} is neither .safetensors nor .pt.\n  Mend: give {URI_FORMS}.")
        return path
    if not path.exists():
        raise UserError(
            f"there is no critic at {path}.\n  Mend: train one (wmtp-ds train --stage critic), or give the path "
            "of its checkpoint_best."
        )
    for candidate in (path / VALUE_HEAD_FILE, path / BEST_FOLDER / VALUE_HEAD_FILE):
        if candidate.is_file():
            return candidate
    held = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{path} holds no {VALUE_HEAD_FILE}, nor does a {BEST_FOLDER}/ in it (it holds: {held}).\n"
        "  Mend: give the checkpoint_best folder of a critic."
    )


def _download(uri: CriticUri, tracking_uri: str, cache_dir: Path) -> Path:
    shown = mlflow_client.mask_secrets(uri.text)
    store = _checked_store(uri, shown, tracking_uri)
    try:
        client = mlflow_client.connect(store, timeout=30, retries=2)
        if uri.run_id:
            _check_run(client, uri, shown, tracking_uri)
        artifact = _find_artifact(uri.artifact_uri, shown, store)
        return _fetch(artifact, store, cache_dir)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot get the critic '{shown}' from MLflow at {mlflow_client.mask_secrets(tracking_uri)}: "
            f"{mlflow_client.explain(error)}\n  Mend: check mlflow.tracking_uri and that the server answers, or give "
            "the critic's local folder."
        ) from None


def _checked_store(uri: CriticUri, shown: str, tracking_uri: str) -> str:
    """The tracking URI for MLflow, once it is clear that it can have the artifact."""
    if not tracking_uri:
        raise UserError(
            f"'{shown}' needs MLflow, but mlflow.tracking_uri is empty.\n"
            "  Mend: set mlflow.tracking_uri to where the critic was tracked, or give its local folder."
        )
    store = mlflow_client.clean_tracking_uri(tracking_uri)
    if uri.kind == "mlflow-artifacts" and not store.startswith(("http://", "https://")):
        raise UserError(
            f"'{shown}' is served by a tracking server, but mlflow.tracking_uri is "
            f"'{mlflow_client.mask_secrets(tracking_uri)}'.\n  Mend: set mlflow.tracking_uri to the server's http(s) "
            "address, or use runs:/<run_id>/<path>."
        )
    if store.startswith("sqlite:////"):  # opening a database that is not there would make an empty one
        database = Path(store.removeprefix("sqlite:///").partition("?")[0])
        if not database.exists():
            raise UserError(
                f"'{shown}' cannot be found: there is no MLflow database at {database}.\n"
                "  Mend: set mlflow.tracking_uri to where the critic was tracked, or give its local folder."
            )
    return store


def _check_run(client: Any, uri: CriticUri, shown: str, tracking_uri: str) -> None:
    try:
        run = client.get_run(uri.run_id)
    except Exception as error:
        forbidden = mlflow_client.is_forbidden(error)
        if not forbidden and mlflow_client.error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"'{shown}' names the run {uri.run_id}, which MLflow at {mlflow_client.mask_secrets(tracking_uri)} does "
            f"not have{', or does not show to this user' if forbidden else ''}.\n  Mend: copy the run's id from "
            "MLflow, or set mlflow.tracking_uri to where it was tracked."
        ) from None
    if uri.experiment_id and run.info.experiment_id != uri.experiment_id:
        raise UserError(
            f"'{shown}' says experiment {uri.experiment_id}, but the run {uri.run_id} is of experiment "
            f"{run.info.experiment_id}.\n  Mend: write mlflow://{run.info.experiment_id}/{uri.run_id}/artifacts/"
            f"{uri.path}, or check the run's id."
        )


def _find_artifact(artifact_uri: str, shown: str, store: str) -> str:
    """The URI of the value head's file at or below ``artifact_uri``."""
    from mlflow.artifacts import list_artifacts

    def names(uri: str) -> list[str]:
        return sorted(file.path.rpartition("/")[2] for file in list_artifacts(artifact_uri=uri, tracking_uri=store))

    parent, _, name = artifact_uri.rpartition("/")
    if name.endswith((".safetensors", ".pt")):
        held = names(parent)
        if name in held:
            return artifact_uri
        raise UserError(_missing_artifact(shown, f"beside it: {', '.join(held[:8]) or 'nothing'}"))
    held = names(artifact_uri)
    if VALUE_HEAD_FILE in held:
        return f"{artifact_uri}/{VALUE_HEAD_FILE}"
    if BEST_FOLDER in held and VALUE_HEAD_FILE in names(f"{artifact_uri}/{BEST_FOLDER}"):
        return f"{artifact_uri}/{BEST_FOLDER}/{VALUE_HEAD_FILE}"
    raise UserError(_missing_artifact(shown, f"it holds: {', '.join(held[:8]) or 'nothing'}"))


def _missing_artifact(shown: str, found: str) -> str:
    return (
        f"there is no {VALUE_HEAD_FILE} at '{shown}' ({found}).\n  Mend: give the path of a critic's "
        f"{BEST_FOLDER} as MLflow lists it under the run's artifacts; if the run was tracked while the server was "
        "down, send it first: wmtp-ds track sync RUN_DIR."
    )


def _fetch(artifact_uri: str, store: str, cache_dir: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    name = artifact_uri.rpartition("/")[2]
    folder = cache_dir / hashlib.sha256(f"{store}\n{artifact_uri}".encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".download-", dir=cache_dir))
    try:
        downloaded = Path(download_artifacts(artifact_uri=artifact_uri, dst_path=str(temporary), tracking_uri=store))
        if not downloaded.is_file() or not downloaded.resolve().is_relative_to(temporary.resolve()):
            raise UserError(f"MLflow gave no file for '{mlflow_client.mask_secrets(artifact_uri)}'.")
        os.replace(downloaded, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / name
