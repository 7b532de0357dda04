"""The clinic: cases, the patient, the four stages of a consultation, and the pipeline that runs them."""
