"""The decode step on a CPU: one C file, what compiles it, and what describes a model to it."""
