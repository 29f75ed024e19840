"""Imagine-Bench as a metric of `evaluate`; the work is done by the package echo4o-hf."""

from echo4o_hf.benchmarks.metrics import ImagineBench as ImagineBench
