# Which service account of the namespace predmaint may do what in which bucket, by EKS Pod Identity: there are no keys, and nothing to annotate.
locals {
  grants = {
    predmaint-pipeline   = { archive = "read", pipelines = "write" }
    predmaint-controller = { pipelines = "read" }
    mlflow               = { mlflow = "write" }
    backup               = { backups = "add" }
  }
  actions = {
    read  = ["s3:GetObject"]
    write = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    add   = ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"]
  }
  pod_trust = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = ["sts:AssumeRole", "sts:TagSession"]
      Principal = { Service = "pods.eks.amazonaws.com" }
      Condition = { StringEquals = { "aws:SourceAccount" = data.aws_caller_identity.here.account_id } }
    }]
  })
}

resource "aws_iam_role" "pods" {
  for_each           = local.grants
  name               = "${var.name}-${each.key}"
  assume_role_policy = local.pod_trust
}

resource "aws_iam_role_policy" "pods" {
  for_each = local.grants
  name     = "buckets"
  role     = aws_iam_role.pods[each.key].name
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = flatten([for bucket, right in each.value : [
      { Effect = "Allow", Action = ["s3:ListBucket", "s3:GetBucketLocation"], Resource = aws_s3_bucket.main[bucket].arn },
      { Effect = "Allow", Action = local.actions[right], Resource = "${aws_s3_bucket.main[bucket].arn}/*" },
    ]])
  })
}

resource "aws_eks_pod_identity_association" "pods" {
  for_each        = local.grants
  cluster_name    = aws_eks_cluster.main.name
  namespace       = "predmaint"
  service_account = each.key
  role_arn        = aws_iam_role.pods[each.key].arn
}

# Two parts of the cluster itself: volumes, and nodes that come and go.
resource "aws_iam_role" "volumes" {
  name               = "${var.name}-volumes"
  assume_role_policy = local.pod_trust
}

resource "aws_iam_role_policy_attachment" "volumes" {
  role       = aws_iam_role.volumes.name
  policy_arn = "arn:aws:iam::aws:policy/service-role/AmazonEBSCSIDriverPolicy"
}

resource "aws_eks_pod_identity_association" "volumes" {
  cluster_name    = aws_eks_cluster.main.name
  namespace       = "kube-system"
  service_account = "ebs-csi-controller-sa"
  role_arn        = aws_iam_role.volumes.arn
}

resource "aws_iam_role" "autoscaler" {
  name               = "${var.name}-autoscaler"
  assume_role_policy = local.pod_trust
}

resource "aws_iam_role_policy" "autoscaler" {
  #checkov:skip=CKV_AWS_355:To describe is allowed for all or for none; to change is bound to this cluster's groups by their tag
  name = "scale"
  role = aws_iam_role.autoscaler.name
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Effect = "Allow"
        Action = [
          "autoscaling:DescribeAutoScalingGroups", "autoscaling:DescribeAutoScalingInstances", "autoscaling:DescribeLaunchConfigurations",
          "autoscaling:DescribeScalingActivities", "autoscaling:DescribeTags", "ec2:DescribeImages", "ec2:DescribeInstanceTypes",
          "ec2:DescribeLaunchTemplateVersions", "ec2:GetInstanceTypesFromInstanceRequirements", "eks:DescribeNodegroup",
        ]
        Resource = "*"
      },
      {
        Effect    = "Allow"
        Action    = ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"]
        Resource  = "*"
        Condition = { StringEquals = { "aws:ResourceTag/k8s.io/cluster-autoscaler/${var.name}" = "owned" } }
      },
    ]
  })
}

resource "aws_eks_pod_identity_association" "autoscaler" {
  cluster_name    = aws_eks_cluster.main.name
  namespace       = "kube-system"
  service_account = "cluster-autoscaler"
  role_arn        = aws_iam_role.autoscaler.arn
}
