variable "project" {
  description = "Id of the Google Cloud project that all of it belongs to. Buckets are named after it."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project))
    error_message = "A project's id has 6 to 30 lower-case letters, digits and hyphens, as in example-project."
  }
}

variable "region" {
  description = "Where all of it runs and all data stay."
  type        = string
  default     = "europe-west1"
  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "A region, not a zone, as in europe-west1."
  }
}

variable "name" {
  description = "First part of the names of what is made."
  type        = string
  default     = "predmaint"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,18}[a-z0-9]$", var.name))
    error_message = "3 to 20 lower-case letters, digits and hyphens, beginning with a letter."
  }
}

variable "network_cidr" {
  description = "Private IPv4 range, cut into nodes (/20), pods (/17), services (/20) and the database (/20)."
  type        = string
  default     = "10.60.0.0/16"
  validation {
    condition     = can(cidrnetmask(var.network_cidr)) && endswith(var.network_cidr, "/16")
    error_message = "A /16 in private space that no other network of yours uses, as in 10.60.0.0/16."
  }
}

variable "cpu_machine_type" {
  description = "Of the nodes that carry Kubeflow, MLflow and steps without a GPU."
  type        = string
  default     = "e2-standard-4"
  validation {
    condition     = can(regex("^(e2|n2|n2d|n4|c3|c4|t2d)-", var.cpu_machine_type))
    error_message = "A general-purpose machine on x86, as in e2-standard-4: the images are built for amd64."
  }
}

variable "cpu_nodes" {
  description = "Fewest and most of them, over all zones."
  type        = object({ min = number, max = number })
  default     = { min = 2, max = 6 }
  validation {
    condition     = var.cpu_nodes.min >= 2 && var.cpu_nodes.max >= var.cpu_nodes.min && var.cpu_nodes.max <= 50
    error_message = "min is at least 2 (MLflow has two replicas), and max lies between min and 50."
  }
}

variable "gpu_machine_type" {
  description = "Of the spot nodes with a GPU; there are none until a step asks for one."
  type        = string
  default     = "g2-standard-4"
  validation {
    condition     = can(regex("^g2-", var.gpu_machine_type))
    error_message = "A machine of the g2 family (NVIDIA L4), as in g2-standard-4."
  }
}

variable "gpu_nodes_max" {
  description = "Most of them, over all zones; 0 forbids them."
  type        = number
  default     = 2
  validation {
    condition     = var.gpu_nodes_max >= 0 && var.gpu_nodes_max <= 20 && floor(var.gpu_nodes_max) == var.gpu_nodes_max
    error_message = "A whole number from 0 to 20."
  }
}

variable "database_tier" {
  description = "Machine of Cloud SQL."
  type        = string
  default     = "db-custom-2-7680"
  validation {
    condition     = can(regex("^db-(custom|perf-optimized)-", var.database_tier))
    error_message = "A dedicated machine, as in db-custom-2-7680: shared cores have no service level."
  }
}

variable "database_highly_available" {
  description = "A standby in a second zone; doubles the database's price."
  type        = bool
  default     = false
}

variable "database_password" {
  description = "Of MLflow's user, from a secret manager through TF_VAR_database_password. Neither plan nor state keeps it."
  type        = string
  sensitive   = true
  ephemeral   = true
  validation {
    condition     = length(var.database_password) >= 24
    error_message = "At least 24 characters, as `openssl rand -hex 24` gives them."
  }
}

variable "database_password_version" {
  description = "Raise it by one whenever the password changes: a write-only argument can't be compared."
  type        = number
  default     = 1
  validation {
    condition     = var.database_password_version >= 1 && floor(var.database_password_version) == var.database_password_version
    error_message = "A whole number from 1."
  }
}

variable "archive_days" {
  description = "Raw windows in the archive are deleted by the agents' own rule; what they forget goes after so many days."
  type        = number
  default     = 800
  validation {
    condition     = var.archive_days >= 90
    error_message = "At least 90, or the bucket deletes what the archive still counts on (archive_suspicious_retention_days is 730)."
  }
}

variable "backup_days" {
  description = "How long backups of the databases stay."
  type        = number
  default     = 35
  validation {
    condition     = var.backup_days >= 7 && var.backup_days <= 365
    error_message = "From 7 to 365 days."
  }
}
