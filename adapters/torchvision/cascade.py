"""Cascade R-CNN on top of torchvision's `RoIHeads`

Paper: `Cascade R-CNN: High Quality Object Detection and Instance Segmentation` - https://arxiv.org/abs/1906.09756

Shapes:
    N        boxes of all images of a batch
    C        number of classes, with the background
    H, W     height and width of an image
"""

# ruff: noqa: B905  TorchScript does not know the argument `strict` of zip

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import boxes as box_ops

__all__ = ["BOX_WEIGHTS", "IOU_THRESHOLDS", "LOSS_WEIGHTS", "CascadePredictor", "CascadeRoIHeads"]

IOU_THRESHOLDS = (0.5, 0.6, 0.7)
BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)


class CascadePredictor(FastRCNNPredictor):
    """Returns class logits (N, C) and box deltas (N, 4 C).

    The deltas are the same for every class. The first weights are small, so that a new cascade hardly moves the boxes
    of the region proposal network.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.num_classes = num_classes
        self.bbox_pred = nn.Linear(in_channels, 4)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.flatten(start_dim=1)
        dtype = self.cls_score.weight.dtype  # under autocast too: torchvision computes boxes in it
        return self.cls_score(x).to(dtype), self.bbox_pred(x).to(dtype).repeat(1, self.num_classes)


class CascadeRoIHeads(RoIHeads):
    """Box heads in a row, each of which refines the boxes of the previous one.

    In training, each head has its own positive boxes: those with an intersection over union of at least its threshold.
    The boxes of the objects join the proposals of every head. No gradient flows through refined boxes.
    A head receives what the previous one has made of its sampled proposals, clipped to the image.

    In evaluation, a detection has the box of the last head and the mean of the probabilities of all heads.

    There is one mask head. It is trained on the positive proposals of the first head, as in Detectron2, because the
    later heads have few of them at the beginning. In evaluation it receives the boxes of the last head.

    Losses: `loss_classifier_1`, `loss_box_reg_1` and so on for each head, already weighted, and `loss_mask`.
    """

    # TorchScript needs the types of attributes that are not modules.
    __annotations__ = {
        "box_coder": BoxCoder,
        "proposal_matcher": Matcher,
        "fg_bg_sampler": BalancedPositiveNegativeSampler,
        "box_coders": list[BoxCoder],
        "proposal_matchers": list[Matcher],
        "loss_weights": list[float],
    }

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[nn.Module],
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
        iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
        box_weights: Sequence[Sequence[float]] = BOX_WEIGHTS,
        loss_weights: Sequence[float] = LOSS_WEIGHTS,
    ) -> None:
        """Creates the heads. The other arguments are those of `RoIHeads`.

        Args:
            box_roi_pool: Pools the features of a box, for all heads.
            box_heads: Maps pooled features to vectors, one module for each head.
            box_predictors: Maps vectors to logits (N, C) and deltas (N, 4 C) that are the same for every class.
            batch_size_per_image: Proposals that each head is trained on.
            positive_fraction: Largest share of positive ones among them.
            score_thresh: Smallest score of a detection.
            nms_thresh: Intersection over union above which the weaker of two detections of a class is removed.
            detections_per_img: Largest number of detections in an image.
            mask_roi_pool: Pools the features of a mask; None for a model without masks.
            mask_head: Convolutions on pooled features.
            mask_predictor: Maps them to the logits of a mask for each class.
            iou_thresholds: Smallest intersection over union of a positive proposal, for each head.
            box_weights: Factors of the encoded boxes, for each head.
            loss_weights: Factors of the losses, for each head.

        Raises:
            ValueError: If the number of heads, predictors, thresholds or weights differs.
        """
        lengths = [len(part) for part in (box_heads, box_predictors, iou_thresholds, box_weights, loss_weights)]
        if len(set(lengths)) != 1 or not lengths[0]:
            raise ValueError(
                "box_heads, box_predictors, iou_thresholds, box_weights and loss_weights must have the same length, "
                f"got {', '.join(map(str, lengths))}"
            )
        super().__init__(
            box_roi_pool,
            nn.ModuleList(box_heads),
            nn.ModuleList(box_predictors),
            iou_thresholds[0],
            iou_thresholds[0],
            batch_size_per_image,
            positive_fraction,
            box_weights[-1],  # torchvision decodes the detections with it
            score_thresh,
            nms_thresh,
            detections_per_img,
            mask_roi_pool,
            mask_head,
            mask_predictor,
        )
        self.box_coders = [BoxCoder(tuple(weights)) for weights in box_weights]
        self.proposal_matchers = [Matcher(iou, iou, allow_low_quality_matches=False) for iou in iou_thresholds]
        self.loss_weights = [float(weight) for weight in loss_weights]

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Returns the losses in training, the detections in evaluation.

        Args:
            features: Feature maps by name, each (B, channels, height, width).
            proposals: Boxes (n, 4) of each image in pixels.
            image_shapes: Height and width of each image in pixels.
            targets: Boxes (n, 4), labels (n,) and masks (n, H, W) of each image; only in training.

        Returns:
            A dictionary with boxes, labels, scores and masks for each image, and the losses by name. One of both is
            empty.

        Raises:
            ValueError: If targets are missing in training, or a target has no boxes, labels or masks.
        """
        if self.training:
            self.check_targets(targets)
            assert targets is not None
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _losses(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        gt_boxes = [target["boxes"].to(proposals[0].dtype) for target in targets]
        gt_labels = [target["labels"] for target in targets]
        losses: dict[str, torch.Tensor] = {}
        for i, (box_head, box_predictor) in enumerate(zip(self.box_head, self.box_predictor)):
            sampled, matched_idxs, labels, is_proposal = self._sample(i, proposals, gt_boxes, gt_labels)
            logits, deltas = box_predictor(box_head(self.box_roi_pool(features, sampled, image_shapes)))
            matched = [self._select(boxes, idxs) for boxes, idxs in zip(gt_boxes, matched_idxs)]
            regression_targets = self.box_coders[i].encode(matched, sampled)
            loss_classifier, loss_box_reg = fastrcnn_loss(logits, deltas, labels, regression_targets)
            losses[f"loss_classifier_{i + 1}"] = loss_classifier * self.loss_weights[i]
            losses[f"loss_box_reg_{i + 1}"] = loss_box_reg * self.loss_weights[i]
            if i == 0 and self.has_mask():
                losses["loss_mask"] = self._mask_loss(features, sampled, matched_idxs, labels, image_shapes, targets)
            # The next head adds the boxes of the objects itself.
            refined = self._refine(i, deltas.detach(), sampled, image_shapes)
            proposals = [boxes[keep] for boxes, keep in zip(refined, is_proposal)]
        return losses

    def _detect(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, torch.Tensor]]:
        probabilities: list[torch.Tensor] = []
        deltas = torch.empty(0)
        boxes = proposals
        for i, (box_head, box_predictor) in enumerate(zip(self.box_head, self.box_predictor)):
            if i > 0:
                boxes = self._refine(i - 1, deltas, boxes, image_shapes)
            logits, deltas = box_predictor(box_head(self.box_roi_pool(features, boxes, image_shapes)))
            probabilities.append(logits.softmax(-1))
        mean = torch.stack(probabilities).mean(0)
        # torchvision applies softmax, which returns the mean again because its sum is 1.
        found = self.postprocess_detections(mean.log(), deltas, boxes, image_shapes)
        result: list[dict[str, torch.Tensor]] = []
        for image_boxes, scores, labels in zip(found[0], found[1], found[2]):
            result.append({"boxes": image_boxes, "labels": labels, "scores": scores})
        if self.has_mask():
            masks = maskrcnn_inference(self._mask_logits(features, found[0], image_shapes), found[2])
            for image_masks, image_result in zip(masks, result):
                image_result["masks"] = image_masks
        return result

    def _sample(
        self, i: int, proposals: list[torch.Tensor], gt_boxes: list[torch.Tensor], gt_labels: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Samples the proposals that head i is trained on.

        Returns:
            For each image: boxes (n, 4), index of the matched object (n,), its label or 0 (n,), and whether a box is
            a proposal instead of an object (n,).
        """
        candidates = self.add_gt_proposals(proposals, gt_boxes)
        self.proposal_matcher = self.proposal_matchers[i]
        matched_idxs, labels = self.assign_targets_to_proposals(candidates, gt_boxes, gt_labels)
        is_proposal: list[torch.Tensor] = []
        for image, chosen in enumerate(self.subsample(labels)):
            candidates[image] = candidates[image][chosen]
            matched_idxs[image] = matched_idxs[image][chosen]
            labels[image] = labels[image][chosen]
            is_proposal.append(chosen < proposals[image].shape[0])
        return candidates, matched_idxs, labels, is_proposal

    def _select(self, gt_boxes: torch.Tensor, matched_idxs: torch.Tensor) -> torch.Tensor:
        """Returns the matched boxes; zeros in an image without objects."""
        if gt_boxes.shape[0] == 0:
            return gt_boxes.new_zeros((matched_idxs.shape[0], 4))
        return gt_boxes[matched_idxs]

    def _refine(
        self, i: int, deltas: torch.Tensor, boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[torch.Tensor]:
        """Returns the boxes that head i makes of its input, clipped to each image.

        A box that leaves the image becomes a box without area. It stays in the list as background: its intersection
        over union is 0, and torchvision removes it from the detections.
        """
        counts = [image_boxes.shape[0] for image_boxes in boxes]
        refined = self.box_coders[i].decode(deltas[:, :4], boxes).reshape(-1, 4).split(counts, 0)
        return [box_ops.clip_boxes_to_image(part, shape) for part, shape in zip(refined, image_shapes)]

    def _mask_logits(
        self, features: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        assert self.mask_roi_pool is not None and self.mask_head is not None and self.mask_predictor is not None
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))

    def _mask_loss(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        matched_idxs: list[torch.Tensor],
        labels: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]],
    ) -> torch.Tensor:
        positives = [image_labels > 0 for image_labels in labels]
        boxes = [image_boxes[positive] for image_boxes, positive in zip(proposals, positives)]
        logits = self._mask_logits(features, boxes, image_shapes)
        return maskrcnn_loss(
            logits,
            boxes,
            [target["masks"] for target in targets],
            [target["labels"] for target in targets],
            [idxs[positive] for idxs, positive in zip(matched_idxs, positives)],
        )
