"""`dualspeed finetune` that is killed by SIGKILL inside an optimizer step: python -m ... STEP ARGUMENTS."""

import os
import signal
import sys

from dualspeed.cli import main
from dualspeed.training.resume import EndsAtLastStep

STEP = int(sys.argv[1])
stock = EndsAtLastStep.training_step


def killing(trainer, *args, **kwargs):
    loss = stock(trainer, *args, **kwargs)
    if trainer.state.global_step == STEP:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


EndsAtLastStep.training_step = killing
sys.exit(main(sys.argv[2:]))
