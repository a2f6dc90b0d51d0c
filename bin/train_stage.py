#!/usr/bin/env python
"""What DeepSpeed's launcher starts: ``deepspeed bin/train_stage.py --stage rho1 --num_gpus 4``."""

from wmtp_ds.rank import main

if __name__ == "__main__":
    main()
