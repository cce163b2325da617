"""Allow list: the classes and functions that fitted TabPFN estimators of the tested version consist of."""

from __future__ import annotations

# The version these classes belong to; others may have other attributes.
TESTED = "9.2"

_STEPS = "tabpfn.preprocessing.steps"
_CLASSES = """
tabpfn.architectures.kv_cache.KVCacheEntry
tabpfn.architectures.kv_cache.QuantizedKVCacheEntry
tabpfn.architectures.shared.bar_distribution.FullSupportBarDistribution
tabpfn.architectures.tabpfn_v2.TabPFNV2Cache
tabpfn.architectures.tabpfn_v2_5.TabPFNV2p5Cache
tabpfn.architectures.tabpfn_v2_6.TabPFNV2p6Cache
tabpfn.architectures.tabpfn_v3.TabPFNV3Cache
tabpfn.architectures.tabpfn_v3_5.TabPFNV3p5Cache
tabpfn.inference.InferenceEngineCachePreprocessing
tabpfn.inference.InferenceEngineExplicitKVCache
tabpfn.inference.InferenceEngineOnDemand
tabpfn.inference_config.InferenceConfig
tabpfn.inference_tuning.ClassifierEvalMetrics
tabpfn.inference_tuning.ClassifierTuningConfig
tabpfn.inference_tuning.RegressorEvalMetrics
tabpfn.inference_tuning.RegressorTuningConfig
tabpfn.preprocessing.configs.ClassifierEnsembleConfig
tabpfn.preprocessing.configs.PreprocessorConfig
tabpfn.preprocessing.configs.RegressorEnsembleConfig
tabpfn.preprocessing.configs.SampleSubsamplingMethod
tabpfn.preprocessing.datamodel.Feature
tabpfn.preprocessing.datamodel.FeatureModality
tabpfn.preprocessing.datamodel.FeatureSchema
tabpfn.preprocessing.datetimes.DateTransformer
tabpfn.preprocessing.datetimes._FittedDateColumn
tabpfn.preprocessing.ensemble.TabPFNEnsembleMember
tabpfn.preprocessing.ensemble.TabPFNEnsemblePreprocessor
tabpfn.preprocessing.label_encoder.TabPFNLabelEncoder
tabpfn.preprocessing.pipeline_interface.PreprocessingPipeline
tabpfn.preprocessing.text.TextTransformer
tabpfn.preprocessing.text._FittedTextColumn
tabpfn.preprocessing.torch.pipeline_interface.TorchPreprocessingPipeline
sklearn.compose._column_transformer.ColumnTransformer
sklearn.compose._column_transformer.make_column_selector
sklearn.decomposition._truncated_svd.TruncatedSVD
sklearn.feature_extraction.text.TfidfTransformer
sklearn.feature_extraction.text.TfidfVectorizer
sklearn.impute._base.SimpleImputer
sklearn.pipeline.FeatureUnion
sklearn.pipeline.Pipeline
sklearn.preprocessing._data.MinMaxScaler
sklearn.preprocessing._data.PowerTransformer
sklearn.preprocessing._data.QuantileTransformer
sklearn.preprocessing._data.RobustScaler
sklearn.preprocessing._data.StandardScaler
sklearn.preprocessing._polynomial.PolynomialFeatures
sklearn.preprocessing._encoders.OneHotEncoder
sklearn.preprocessing._encoders.OrdinalEncoder
sklearn.preprocessing._function_transformer.FunctionTransformer
sklearn.preprocessing._label.LabelEncoder
skrub._datetime_encoder.DatetimeEncoder
skrub._datetime_encoder._CircularEncoder
skrub._string_encoder.StringEncoder
skrub._to_str.ToStr
"""
_STEP_CLASSES = """
adaptive_quantile_transformer.AdaptiveQuantileTransformer
add_fingerprint_features_step.AddFingerprintFeaturesStep
add_svd_features_step.AddSVDFeaturesStep
encode_categorical_features_step.EncodeCategoricalFeaturesStep
kdi_transformer.KDITransformerWithNaN
nan_handling_polynomial_features_step.NanHandlingPolynomialFeaturesStep
preprocessing_helpers.EfficientColumnTransformer
preprocessing_helpers.OrderPreservingColumnTransformer
remove_constant_features_step.RemoveConstantFeaturesStep
reshape_feature_distribution_step.ReshapeFeatureDistributionsStep
safe_power_transformer.SafePowerTransformer
shuffle_features_step.ShuffleFeaturesStep
squashing_scaler_transformer.SquashingScaler
utils._NoInverseImputer
"""
# Steps that run on the device; their fitted state is tensors.
_DEVICE_STEPS = """
tabpfn.preprocessing.torch.steps.TorchAddFingerprintFeaturesStep
tabpfn.preprocessing.torch.steps.TorchAddSVDFeaturesStep
tabpfn.preprocessing.torch.steps.TorchQuantileTransformerStep
tabpfn.preprocessing.torch.steps.TorchSelectiveQuantileTransformerStep
tabpfn.preprocessing.torch.steps.TorchSelectiveSquashingScalerStep
tabpfn.preprocessing.torch.steps.TorchShuffleFeaturesStep
tabpfn.preprocessing.torch.steps.TorchSoftClipOutliersStep
tabpfn.preprocessing.torch.steps.TorchSquashingScalerStep
tabpfn.preprocessing.torch.steps.TorchStandardScalerStep
tabpfn.preprocessing.torch.torch_quantile_transformer.TorchQuantileTransformer
tabpfn.preprocessing.torch.torch_soft_clip_outliers.TorchSoftClipOutliers
tabpfn.preprocessing.torch.torch_squashing_scaler.TorchSquashingScaler
tabpfn.preprocessing.torch.torch_standard_scaler.TorchStandardScaler
tabpfn.preprocessing.torch.torch_svd.TorchSafeStandardScaler
tabpfn.preprocessing.torch.torch_svd.TorchTruncatedSVD
"""
# Functions that steps apply and types that encoders return. All are pure; none looks up a name.
_NAMES = """
tabpfn.preprocessing.steps.utils._identity
tabpfn.preprocessing.steps.utils._replace_inf_with_nan
numpy.float64
numpy.float32
numpy.int64
numpy.log1p
numpy.expm1
builtins.float
builtins.int
builtins.str
builtins.bool
"""
ALLOWED = frozenset(
    [*_CLASSES.split(), *_DEVICE_STEPS.split(), *_NAMES.split()]
    + [f"{_STEPS}.{name}" for name in _STEP_CLASSES.split()]
)
