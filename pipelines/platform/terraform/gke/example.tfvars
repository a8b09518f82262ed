# What must be said; all else has a default. The password comes from a secret manager: TF_VAR_database_password.
project = "example-project"
