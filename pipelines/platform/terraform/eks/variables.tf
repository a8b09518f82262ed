variable "region" {
  description = "Where all of it runs and all data stay."
  type        = string
  default     = "eu-west-1"
  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "A region, not a zone, as in eu-west-1."
  }
}

variable "zones" {
  description = "Last letters of the availability zones: the control plane needs two, and GPUs are not in all of them."
  type        = list(string)
  default     = ["a", "b", "c"]
  validation {
    condition     = length(distinct(var.zones)) == length(var.zones) && length(var.zones) >= 2 && length(var.zones) <= 4 && alltrue([for z in var.zones : can(regex("^[a-f]$", z))])
    error_message = "Two to four different letters, as in [\"a\", \"b\", \"c\"]."
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
  description = "Private IPv4 range, cut into a private (/19) and a public (/24) subnet a zone."
  type        = string
  default     = "10.60.0.0/16"
  validation {
    condition     = can(cidrnetmask(var.network_cidr)) && endswith(var.network_cidr, "/16")
    error_message = "A /16 in private space that no other network of yours uses, as in 10.60.0.0/16."
  }
}

variable "admin_cidrs" {
  description = "Public addresses from which the cluster's API may be reached. None: only from inside the network, through a VPN or a bastion of yours."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for c in var.admin_cidrs : can(cidrnetmask(c)) && tonumber(split("/", c)[1]) >= 16])
    error_message = "IPv4 ranges of /16 or smaller, as in 203.0.113.7/32: the API is not for the whole internet."
  }
}

variable "admin_role_arns" {
  description = "IAM roles of the people who administer the cluster."
  type        = list(string)
  validation {
    condition     = length(var.admin_role_arns) > 0 && alltrue([for a in var.admin_role_arns : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:role/.+$", a))])
    error_message = "At least one role, as in arn:aws:iam::111122223333:role/platform: nobody else gets in, not even who made the cluster."
  }
}

variable "kubernetes_version" {
  description = "Of the control plane and the nodes; raised by one minor version at a time."
  type        = string
  default     = "1.33"
  validation {
    condition     = can(regex("^1\\.(3[2-9]|[4-9][0-9])$", var.kubernetes_version))
    error_message = "A minor version from 1.32, as in 1.33: the CronJobs rely on what it guarantees."
  }
}

variable "cpu_instance_type" {
  description = "Of the nodes that carry Kubeflow, MLflow and steps without a GPU."
  type        = string
  default     = "m7i.xlarge"
  validation {
    condition     = can(regex("^[cmr][5-8](a|i)[a-z]*\\.", var.cpu_instance_type))
    error_message = "A general-purpose instance on x86, as in m7i.xlarge: the images are built for amd64."
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

variable "gpu_instance_types" {
  description = "Of the spot nodes with a GPU, several so that one is free; there are none until a step asks for one."
  type        = list(string)
  default     = ["g6.xlarge", "g5.xlarge"]
  validation {
    condition     = length(var.gpu_instance_types) > 0 && alltrue([for t in var.gpu_instance_types : can(regex("^g[56]\\.", t))])
    error_message = "Instances of the families g5 or g6 (NVIDIA A10G, L4), as in [\"g6.xlarge\", \"g5.xlarge\"]."
  }
}

variable "gpu_nodes_max" {
  description = "Most of them, over all zones."
  type        = number
  default     = 2
  validation {
    condition     = var.gpu_nodes_max >= 1 && var.gpu_nodes_max <= 20 && floor(var.gpu_nodes_max) == var.gpu_nodes_max
    error_message = "A whole number from 1 to 20."
  }
}

variable "database_class" {
  description = "Instance of RDS."
  type        = string
  default     = "db.t4g.medium"
  validation {
    condition     = can(regex("^db\\.(t4g|m[6-8]g|r[6-8]g)\\.", var.database_class))
    error_message = "An instance with a Graviton processor, as in db.t4g.medium."
  }
}

variable "database_highly_available" {
  description = "A standby in a second zone; doubles the database's price."
  type        = bool
  default     = false
}

variable "database_password" {
  description = "Of the database's first user, from a secret manager through TF_VAR_database_password. Neither plan nor state keeps it."
  type        = string
  sensitive   = true
  ephemeral   = true
  validation {
    condition     = length(var.database_password) >= 24 && can(regex("^[A-Za-z0-9_.-]+$", var.database_password))
    error_message = "At least 24 letters and digits, as `openssl rand -hex 24` gives them: RDS refuses some other characters."
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
