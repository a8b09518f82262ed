# Which service account of the namespace predmaint may do what in which bucket. The account itself is the principal: there are no keys, no Google
# service accounts in between, and nothing to annotate.
locals {
  grants = {
    predmaint-pipeline   = { archive = "read", pipelines = "write" }
    predmaint-controller = { pipelines = "read" }
    mlflow               = { mlflow = "write" }
    backup               = { backups = "add" }
  }
  roles = {
    read  = ["roles/storage.objectViewer"]
    write = ["roles/storage.objectUser"]
    add   = ["roles/storage.objectCreator", "roles/storage.objectViewer"]
  }
  bucket_roles = merge(flatten([for account, buckets in local.grants : [for bucket, right in buckets : {
    for role in local.roles[right] : "${account}/${bucket}/${role}" => { account = account, bucket = bucket, role = role }
  }]])...)
  principal = join("", [
    "principal://iam.googleapis.com/projects/${data.google_project.main.number}",
    "/locations/global/workloadIdentityPools/${var.project}.svc.id.goog/subject/ns/predmaint/sa/",
  ])
}

data "google_project" "main" {}

resource "google_storage_bucket_iam_member" "pods" {
  for_each   = local.bucket_roles
  bucket     = google_storage_bucket.main[each.value.bucket].name
  role       = each.value.role
  member     = "${local.principal}${each.value.account}"
  depends_on = [google_container_cluster.main]
}
