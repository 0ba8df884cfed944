"""A stand-in for apex with the interface that `precision.ApexTrainer` uses, and with apex's demands on its caller.

O2 as Ascend's fork does it: half weights in place, float32 masters in the optimizer, `combine_grad`. What was called
stands in `apex.amp.calls`. Only tests import it.
"""
