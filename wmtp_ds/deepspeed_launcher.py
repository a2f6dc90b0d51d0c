"""DeepSpeed's launcher of one machine, as it is, but for what it imports and never uses: a third of its start."""

import runpy

from wmtp_ds.missing import as_if_missing

if __name__ == "__main__":
    with as_if_missing("mlflow"):  # its autotuner's
        runpy.run_module("deepspeed.launcher.launch", run_name="__main__", alter_sys=True)
