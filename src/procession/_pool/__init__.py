"""The engine of `Pool` and `ProcessPoolExecutor`; `docs/architecture.md` has the picture."""
