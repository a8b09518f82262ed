# What must be said; all else has a default. The password comes from a secret manager: TF_VAR_database_password.
admin_role_arns = ["arn:aws:iam::111122223333:role/platform"]
