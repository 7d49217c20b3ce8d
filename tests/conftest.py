"""The tests run on the CPU, whatever the machine has: they compare exact values, and start more processes than it may have GPUs."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
