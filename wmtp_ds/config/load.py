"""Reading a configuration: layers, references, schema, checks; and all problems at once."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wmtp_ds.config.check_critic import CRITIC_CHECKS, CRITIC_CHECKS_ONLINE
from wmtp_ds.config.check_data import DATA_CHECKS
from wmtp_ds.config.check_models import MODEL_CHECKS
from wmtp_ds.config.check_scores import SCORE_CHECKS
from wmtp_ds.config.check_values import VALUE_CHECKS
from wmtp_ds.config.context import Context
from wmtp_ds.config.deepspeed_file import DEEPSPEED_CHECKS
from wmtp_ds.config.errors import ConfigError, Problem
from wmtp_ds.config.interpolation import interpolate
from wmtp_ds.config.keys import format_key
from wmtp_ds.config.layers import DEFAULT, Layers, UnassignableError, look_up, schema_defaults
from wmtp_ds.config.resolved import Resolved, origins_of
from wmtp_ds.config.sources import Assignment, FileLayer, read_environment, read_files, read_overrides
from wmtp_ds.config.training import stage_names, training_class
from wmtp_ds.config.validation import SchemaCheck


@dataclass
class _Sources:
    """The layers above the defaults, lowest first."""

    files: list[FileLayer]
    assignments: list[Assignment]

    def stack(self, layers: Layers) -> list[Problem]:
        """Put them on top of the layers."""
        problems = []
        for file in self.files:
            layers.merge(file.values, file.origin)
        for assignment in self.assignments:
            try:
                layers.assign(assignment.path, assignment.value, assignment.origin)
            except UnassignableError as error:
                key, where = format_key(assignment.path), str(assignment.origin)
                problems.append(Problem(key, where, str(error), "`wmtp-ds show` prints what there is"))
        return problems

    def stage(self) -> str | None:
        """The stage that they name, if there is one of that name: defaults depend on it."""
        layers = Layers()
        self.stack(layers)
        interpolate(layers)
        _, stage = look_up(layers.tree, ("experiment", "stage"))
        return stage if isinstance(stage, str) and stage in stage_names() else None


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    environ: Mapping[str, str] | None = None,
    checks: bool = True,
    online: bool = False,
) -> Resolved:
    """Read a run's configuration. Later layers win: defaults, ``extends``, the file, ``WMTP_*``, overrides.

    Args:
        path: the TOML file; relative paths in it are relative to the current directory.
        overrides: ``key=value`` each.
        environ: the environment; default: the process's.
        checks: also look at the files that the configuration names; without, only the schema is checked.
        online: also ask MLflow whether the critic's artifact exists.

    Raises:
        ConfigError: there is something wrong; its ``problems`` hold all of it.
    """
    environ = os.environ if environ is None else environ
    files, file_problems = read_files(Path(path))
    variables, variable_problems = read_environment(environ)
    typed, override_problems = read_overrides(overrides)
    problems = [*file_problems, *variable_problems, *override_problems]
    if file_problems:  # without all of the files, everything else would seem to be missing
        raise ConfigError(str(path), problems)

    sources = _Sources(files, [*variables, *typed])
    stage = sources.stage()
    layers = Layers()
    layers.merge(schema_defaults(stage), lambda _: DEFAULT)
    problems += sources.stack(layers)
    failed = interpolate(layers)
    problems += [
        Problem(format_key(key), str(layers.origin(key)), message, mend)
        for key, (message, mend) in failed.items()
        if message
    ]
    schema = SchemaCheck(layers, stage, str(path), failed)
    context = Context(layers, schema.wrong, training_class(stage) if stage else None, str(path), environ)
    context.problems += [*problems, *schema.problems]
    critic_checks = CRITIC_CHECKS_ONLINE if online else CRITIC_CHECKS
    file_checks = (*DEEPSPEED_CHECKS, *MODEL_CHECKS, *SCORE_CHECKS, *critic_checks, *DATA_CHECKS)
    for check in (*VALUE_CHECKS, *(file_checks if checks else ())):
        check(context)

    errors = [problem for problem in context.problems if problem.severity == "error"]
    if errors or schema.config is None:
        raise ConfigError(str(path), errors)
    warnings = [problem for problem in context.problems if problem.severity == "warning"]
    return Resolved(Path(path), schema.config, origins_of(schema.config, layers), warnings)
