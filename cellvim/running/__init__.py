"""Running a long job: what is done and what is left, who works on it, and what it did.

`ledger` keeps the rows of each field as they come; `workers` and `ray_engine` share fields out among processes;
`sessions` says who is at work; `manifest` and `status` say what happened.
"""
