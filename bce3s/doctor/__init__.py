"""Say what this machine has, what is missing and what to choose: the command `bce3s doctor`.

What could crash or hang (torch, DALI, FFCV, every extra) is imported by processes of their own, `probes`; here is only what they found.
"""
