"""What plans are made of: what was asked for, a first look at the plates, the model, and the plan itself.

`cellvim.planning` puts them together.
"""
