"""One thread a test process: small models are quickest so, and equal thread counts give equal sums."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--pictures", metavar="FOLDER", help="where tests/test_pictures.py leaves its screenshots")
