//! The media types of layers, taken apart.
//!
//! ```text
//! application/vnd.kitops.modelkit.<model|modelpart|dataset|code|docs|mcpb>.v1.<tar|raw>[+gzip|+zstd]
//! application/vnd.cncf.model.<weight|weight.config|dataset|code|doc>.v1.<tar|raw>[+gzip|+zstd]     (cnai: older)
//! application/vnd.kitops.modelkit.kitfile.v1+yaml
//! ```

use super::manifest::{Descriptor, KIT_CONFIG};
use super::{Compression, Kind};

const KITFILE: &str = "application/vnd.kitops.modelkit.kitfile.v1+yaml";
const KIT: &str = "application/vnd.kitops.modelkit.";
const MODEL_PACK: [&str; 2] = ["application/vnd.cncf.model.", "application/vnd.cnai.model."];
/// Tells prompts from code, which share a media type.
const SUBTYPE: &str = "ml.kitops.modelkit.layer-subtype";

/// What a layer is, by its media type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LayerType {
    /// Files of an entry.
    Content { kind: Kind, raw: bool, compression: Compression },
    /// The Kitfile itself.
    Kitfile,
    /// The Kitfile as JSON, which some ModelPack artifacts carry among their layers.
    Config,
    /// Something else.
    Unknown,
}

impl LayerType {
    /// What the layer is.
    pub(super) fn of(layer: &Descriptor) -> Self {
        match layer.media_type.as_str() {
            KITFILE => Self::Kitfile,
            KIT_CONFIG => Self::Config,
            media_type => content(media_type, layer).unwrap_or(Self::Unknown),
        }
    }
}

fn content(media_type: &str, layer: &Descriptor) -> Option<LayerType> {
    let (base, format) = match media_type.strip_prefix(KIT) {
        Some(rest) => rest.split_once(".v1.")?,
        None => MODEL_PACK.iter().find_map(|prefix| media_type.strip_prefix(prefix))?.split_once(".v1.")?,
    };
    let kind = match (media_type.starts_with(KIT), base) {
        (true, "model") | (false, "weight") => Kind::Model,
        (true, "modelpart") | (false, "weight.config") => Kind::ModelPart,
        (_, "dataset") => Kind::Dataset,
        (true, "docs") | (false, "doc") => Kind::Docs,
        (true, "mcpb") => Kind::McpServer,
        (_, "code") if layer.annotations.get(SUBTYPE).is_some_and(|subtype| subtype == "prompt") => Kind::Prompt,
        (_, "code") => Kind::Code,
        _ => return None,
    };
    let (format, compression) = format.split_once('+').unwrap_or((format, ""));
    let compression = match compression {
        "" => Compression::None,
        "gzip" => Compression::Gzip,
        "zstd" => Compression::Zstd,
        _ => return None,
    };
    match format {
        "tar" => Some(LayerType::Content { kind, raw: false, compression }),
        "raw" => Some(LayerType::Content { kind, raw: true, compression }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn of(media_type: &str, subtype: Option<&str>) -> LayerType {
        LayerType::of(&Descriptor {
            media_type: media_type.to_owned(),
            digest: Digest::of(b""),
            size: 0,
            annotations: subtype.map(|subtype| (SUBTYPE.to_owned(), subtype.to_owned())).into_iter().collect(),
            platform: None,
            artifact_type: None,
        })
    }

    #[test]
    fn types_of_both_formats_are_known() {
        let content = |kind, raw, compression| LayerType::Content { kind, raw, compression };
        assert_eq!(
            of("application/vnd.kitops.modelkit.model.v1.tar", None),
            content(Kind::Model, false, Compression::None)
        );
        assert_eq!(
            of("application/vnd.kitops.modelkit.modelpart.v1.raw+zstd", None),
            content(Kind::ModelPart, true, Compression::Zstd)
        );
        assert_eq!(
            of("application/vnd.cncf.model.weight.config.v1.tar+gzip", None),
            content(Kind::ModelPart, false, Compression::Gzip)
        );
        assert_eq!(of("application/vnd.cnai.model.doc.v1.raw", None), content(Kind::Docs, true, Compression::None));
        assert_eq!(
            of("application/vnd.kitops.modelkit.mcpb.v1.raw", None),
            content(Kind::McpServer, true, Compression::None)
        );
        assert_eq!(of(KITFILE, None), LayerType::Kitfile);
    }

    #[test]
    fn a_prompt_is_code_with_a_subtype() {
        let code = "application/vnd.kitops.modelkit.code.v1.tar";
        assert!(matches!(of(code, Some("prompt")), LayerType::Content { kind: Kind::Prompt, .. }));
        assert!(matches!(of(code, None), LayerType::Content { kind: Kind::Code, .. }));
    }

    #[test]
    fn anything_else_is_unknown() {
        for media_type in [
            "",
            "application/vnd.kitops.modelkit.weight.v1.tar",
            "application/vnd.cncf.model.model.v1.tar",
            "application/vnd.kitops.modelkit.model.v2.tar",
            "application/vnd.kitops.modelkit.model.v1.tar+lz4",
            "application/vnd.kitops.modelkit.model.v1.zip",
            "application/vnd.oci.image.layer.v1.tar",
        ] {
            assert_eq!(of(media_type, None), LayerType::Unknown, "{media_type}");
        }
    }
}
