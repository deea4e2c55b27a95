"""Weights of other projects in, ours out, and the proof that both agree."""
