"""What judges a consultation: rubrics, steps, facts, examinations, the diagnosis; and how rewards are combined."""
