"""Language models as writers and judges: instructions, asking, answers."""
