"What the edge runtime survives: a site of real parts, the faults that befall it, and the tally of what was lost or doubled."
