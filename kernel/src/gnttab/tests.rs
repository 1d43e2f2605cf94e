//! Grants against a model, hostile granters, and the hypercall.
