locals {
  # after how many days an object goes: 0 never. Versions that were replaced or deleted go after 30.
  buckets = { archive = var.archive_days, backups = var.backup_days, mlflow = 0, pipelines = 180 }
}

resource "aws_s3_bucket" "main" {
  #checkov:skip=CKV_AWS_18:Who read what is in CloudTrail's data events, where they are on; access logs of a bucket would be one more bucket
  #checkov:skip=CKV_AWS_144:Backups are copies already, and the archive is one of what the sites had; a second region is a decision about its price
  #checkov:skip=CKV_AWS_145:S3 encrypts at rest; a key of one's own is a decision for whoever must keep one
  #checkov:skip=CKV2_AWS_62:Nothing waits for news of an object
  for_each = local.buckets
  bucket   = "${data.aws_caller_identity.here.account_id}-${var.name}-${each.key}"
}

resource "aws_s3_bucket_public_access_block" "main" {
  for_each                = local.buckets
  bucket                  = aws_s3_bucket.main[each.key].id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_versioning" "main" {
  for_each = local.buckets
  bucket   = aws_s3_bucket.main[each.key].id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "main" {
  for_each = local.buckets
  bucket   = aws_s3_bucket.main[each.key].id

  rule {
    id     = "age"
    status = "Enabled"
    filter {}
    noncurrent_version_expiration {
      noncurrent_days = 30
    }
    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
    dynamic "expiration" {
      for_each = each.value > 0 ? [each.value] : []
      content {
        days = expiration.value
      }
    }
  }
  depends_on = [aws_s3_bucket_versioning.main]
}

resource "aws_s3_bucket_policy" "tls" {
  for_each = local.buckets
  bucket   = aws_s3_bucket.main[each.key].id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "OnlyTls"
      Effect    = "Deny"
      Principal = "*"
      Action    = "s3:*"
      Resource  = [aws_s3_bucket.main[each.key].arn, "${aws_s3_bucket.main[each.key].arn}/*"]
      Condition = { Bool = { "aws:SecureTransport" = "false" } }
    }]
  })
  depends_on = [aws_s3_bucket_public_access_block.main]
}

resource "aws_ecr_repository" "python" {
  #checkov:skip=CKV_AWS_136:ECR encrypts at rest; a key of one's own is a decision for whoever must keep one
  name                 = "${var.name}/predmaint-python"
  image_tag_mutability = "IMMUTABLE"
  image_scanning_configuration {
    scan_on_push = true
  }
}
