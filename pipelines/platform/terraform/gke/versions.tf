terraform {
  required_version = ">= 1.11.0" # write-only arguments: the database's password is in no state

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "6.50.0"
    }
  }

  # The state, in a bucket made by hand beforehand (versioned, private):
  #   terraform init -backend-config=bucket=NAME -backend-config=prefix=predmaint
  backend "gcs" {}
}

provider "google" {
  project = var.project
  region  = var.region
  default_labels = {
    app = "predmaint"
  }
}
