terraform {
  required_version = ">= 1.11.0" # write-only arguments: the database's password is in no state

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "6.25.0"
    }
  }

  # The state, in a bucket made by hand beforehand (versioned, private), with a lock file beside it:
  #   terraform init -backend-config=bucket=NAME -backend-config=key=predmaint -backend-config=region=REGION -backend-config=use_lockfile=true
  backend "s3" {}
}

provider "aws" {
  region = var.region
  default_tags {
    tags = { app = "predmaint" }
  }
}
