"""Kubeflow pipelines of the stages, and the command line of `maskrcnn`."""

PIPELINES = ("training", "stability")  # each is the function of this name in training.py
