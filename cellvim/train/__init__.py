"""Training of models on plates and labelled crops (`cellvim train`). The only part that requires Lightning."""
