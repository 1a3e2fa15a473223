"""Stage two: the classifier of a trained run is trained anew, its backbone left as it is (method.md, "Stage two"; Kang et al. 2020).

    stage one's checkpoint ─→ features, once, kept on the device ─→ steps on features ─→ a run folder of the same form

Importing this package imports no torch.
"""
