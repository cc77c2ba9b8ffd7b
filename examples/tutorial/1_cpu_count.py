"""How many CPUs there are for this program."""

import procession as mp

print("Number of cpu :", mp.cpu_count())
