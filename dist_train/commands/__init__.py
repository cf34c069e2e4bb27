"""One module for each verb. Its `main(program, arguments)` parses the arguments and runs the verb.

`dist-train VERB`, `python -m dist_train VERB`, `torchrun ... -m dist_train VERB` and `launch/VERB.py` all call it.
"""
