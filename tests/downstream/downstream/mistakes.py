"""Mistakes that the type checkers must find: every marked line is one, and no other line is."""

import celo2_harness as c2
from celo2_harness import harness

harness.build(preset="adamw", learning_rate="fast")  # mistake
harness.build(preset=3)  # mistake
harness.build(stric=True)  # mistake
c2.normalize_rms("per_stp")  # mistake
c2.add_decayed_weights(0.1, "coupled")  # mistake
c2.load_weights(1.5)  # mistake
names: list[int] = c2.bundled_weights()  # mistake
c2.Weights(theta=[1.0])  # mistake
print(c2.no_such_name)  # mistake
