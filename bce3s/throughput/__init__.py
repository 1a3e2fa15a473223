"""The profiler, `bce3s profile`: a roofline of the pipeline, every stage alone, then the stages together, on the real data and order.

    storage ─→ host read ─→ decode ─→ loader (decode + augment) ─→ copy to the device ─→ step            each alone: its own limit
                                            contention: step while the loader runs  ─→ end to end        together

Rates come in two units, see `rows.py`. Importing this package imports neither torch nor a loader.
"""
