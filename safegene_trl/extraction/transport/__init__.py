"""Safety directions carried from one model to another of any architecture, and made a vector there.

Read in the order of the steps: `states` (what both models say to the same texts), `directions` (in
the source), `matching` (of layers), `maps` (from state to state, fitted on benign anchors),
`detectors` (of harmful prompts, in the target) and `transport` (all of them in turn).
"""
