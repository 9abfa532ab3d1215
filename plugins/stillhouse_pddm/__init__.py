"""PDDM: distillation along a path of small networks whose parameters PDNet learns to continue."""
