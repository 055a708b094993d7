//! `kitfs ls`: the names in a kit, without a mount.

use clap::Args;
use serde_json::{Value, json};

use super::kits::{self, KitArgs};
use super::options::{JsonArgs, LookVerifyArgs, ProgressArgs};
use super::output::{self, Output};
use super::progress::Progress;
use super::{Failure, walk};
use crate::fetch::Tier;
use crate::fs::{Attr, Fs, NodeKind};
use crate::path::TreePath;
use crate::reference::Reference;

/// Lists what is in a kit
#[derive(Debug, Args)]
#[command(
    override_usage = "kitfs ls [OPTIONS] <REF> [PATH]",
    after_help = "\
Examples:
  kitfs ls ghcr.io/team/llama:8b             the root
  kitfs ls -l llama:8b weights               modes, sizes and times of what is in weights/
  kitfs ls -lR --verify=none llama:8b        by the headers alone, where a layer is huge"
)]
pub(super) struct Ls {
    /// The kit
    #[arg(value_name = "REF")]
    reference: Reference,
    /// A file or directory of it [default: its root]
    #[arg(value_name = "PATH", default_value = "", hide_default_value = true, value_parser = walk::parse_path)]
    path: TreePath,
    /// Show mode, size and time (UTC) too
    #[arg(short, long)]
    long: bool,
    /// Show what is in directories too
    #[arg(short = 'R', long)]
    recursive: bool,
    #[command(flatten)]
    kit: KitArgs,
    #[command(flatten)]
    verify: LookVerifyArgs,
    #[command(flatten)]
    json: JsonArgs,
    #[command(flatten)]
    progress: ProgressArgs,
}

/// One line of a listing.
pub(super) struct Row {
    pub(super) path: TreePath,
    pub(super) name: Vec<u8>,
    pub(super) attr: Attr,
    pub(super) target: Option<Vec<u8>>,
}

/// A directory with what is in it, or the one file that was asked for.
struct Section {
    title: Option<TreePath>,
    rows: Vec<Row>,
}

impl Ls {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (context, kit) = self.kit.open(&self.reference, self.verify.verify()).await?;
        let progress = Progress::of(&kit.layers, self.progress.mode());
        let mut tree = kit.skeleton();
        let unverified = self.verify.is_none();
        if unverified {
            kits::list_unverified(&kit, &mut tree, &self.path).await?;
        } else {
            output::say_all("warning", kit.probe(&context, &mut tree).await?.warnings);
        }
        let fs = kits::look(kit, context, tree);
        // Targets of links are in verified listings only.
        let lister = Lister { fs: &fs, targets: !unverified };
        let sections = lister.list(&self.path, !self.long, self.recursive).await?;
        drop(progress);
        output::say_all("warning", fs.conflicts());
        if unverified {
            kits::say_unverified("names, modes and sizes");
        }
        let mut out = Output::new();
        if self.json.json {
            let proved =
                |layer: &crate::modelkit::Layer| layer.root.is_within(&self.path) || self.path.is_within(&layer.root);
            let concerned = fs.kit().layers.iter().filter(|layer| proved(&layer.layer));
            let verified = !unverified && concerned.map(|layer| layer.tier()).all(|tier| tier == Tier::Derived);
            let resolved = &fs.kit().resolved;
            out.json(&json!({
                "reference": resolved.reference.to_string(),
                "digest": resolved.digest,
                "verified": verified,
                "last_known": resolved.last_known,
                "notes": resolved.notes,
                "entries": sections.iter().flat_map(|section| &section.rows).map(Row::json).collect::<Vec<_>>(),
            }))?;
        } else {
            self.print(&mut out, &sections)?;
        }
        out.finish()
    }

    fn print(&self, out: &mut Output, sections: &[Section]) -> Result<(), Failure> {
        for (at, Section { title, rows }) in sections.iter().enumerate() {
            if at > 0 {
                out.line("")?;
            }
            if let (true, Some(title)) = (self.recursive, title) {
                let name = if title.is_root() { b"." } else { title.as_bytes() };
                out.name("", name, ":")?;
            }
            let width = rows.iter().map(|row| row.attr.size.to_string().len()).max().unwrap_or(0);
            for row in rows {
                row.print(out, self.long.then_some(width))?;
            }
        }
        Ok(())
    }
}

/// Goes through a kit.
struct Lister<'a> {
    fs: &'a Fs,
    targets: bool,
}

impl Lister<'_> {
    async fn list(&self, path: &TreePath, through_last: bool, recursive: bool) -> Result<Vec<Section>, Failure> {
        let (found, attr) = walk::find(self.fs, path, through_last).await?;
        if attr.kind != NodeKind::Directory {
            let name = path.as_bytes().to_vec();
            return Ok(vec![Section { title: None, rows: vec![self.row(found, name, attr).await?] }]);
        }
        let mut sections = Vec::new();
        let mut pending = vec![(found, attr)];
        while let Some((dir, attr)) = pending.pop() {
            let rows = self.rows(&dir, &attr).await?;
            if recursive {
                let dirs = rows.iter().rev().filter(|row| row.attr.kind == NodeKind::Directory);
                pending.extend(dirs.map(|row| (row.path.clone(), row.attr.clone())));
            }
            sections.push(Section { title: Some(dir), rows });
        }
        Ok(sections)
    }

    /// What is in a directory.
    async fn rows(&self, dir: &TreePath, attr: &Attr) -> Result<Vec<Row>, Failure> {
        let mut rows = Vec::new();
        for (name, attr) in walk::entries(self.fs, dir, attr.ino).await? {
            let path = dir.join(&TreePath::clean(&name)?)?;
            rows.push(self.row(path, name, attr).await?);
        }
        Ok(rows)
    }

    async fn row(&self, path: TreePath, name: Vec<u8>, attr: Attr) -> Result<Row, Failure> {
        let target = match attr.kind {
            NodeKind::Symlink if self.targets => {
                Some(self.fs.readlink(attr.ino).await.map_err(|error| walk::at(&path, error))?)
            }
            _ => None,
        };
        Ok(Row { path, name, attr, target })
    }
}

impl Row {
    /// Writes the row: the name, behind mode, size (in a column of `width`) and time if a width is given.
    pub(super) fn print(&self, out: &mut Output, width: Option<usize>) -> Result<(), Failure> {
        let Some(width) = width else { return out.name("", &self.name, "") };
        let time = output::timestamp(self.attr.mtime).replace('T', " ").replace('Z', "");
        let before = format!("{} {:>width$} {time} ", mode(&self.attr), self.attr.size);
        let target = self.target.as_deref().map(|target| format!(" -> {}", output::printable(target)));
        out.name(before, &self.name, &target.unwrap_or_default())
    }

    /// The row as JSON. A name that is not UTF-8 is shown lossily.
    pub(super) fn json(&self) -> Value {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut row = attributes(&self.attr);
        row["path"] = json!(text(self.path.as_bytes()));
        if let Some(target) = &self.target {
            row["target"] = json!(text(target));
        }
        row
    }
}

/// Type, mode, size and time as JSON.
pub(super) fn attributes(attr: &Attr) -> Value {
    let kind = match attr.kind {
        NodeKind::File => "file",
        NodeKind::Directory => "dir",
        NodeKind::Symlink => "symlink",
    };
    json!({ "type": kind, "mode": format!("{:04o}", attr.mode), "size": attr.size, "mtime": attr.mtime })
}

/// Type and permission bits as `ls -l` writes them.
pub(super) fn mode(attr: &Attr) -> String {
    let kind = match attr.kind {
        NodeKind::File => '-',
        NodeKind::Directory => 'd',
        NodeKind::Symlink => 'l',
    };
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = attr.mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (attr.mode & special != 0, bits & 1 != 0) {
            (false, true) => 'x',
            (false, false) => '-',
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fs::Ino;

    #[test]
    fn modes_are_written_as_ls_writes_them() {
        let attr = |kind, mode| Attr {
            ino: Ino::ROOT,
            kind,
            size: 0,
            mode,
            uid: 0,
            gid: 0,
            mtime: 0,
            nlink: 1,
            ttl: Duration::ZERO,
            name_ttl: Duration::ZERO,
        };
        for (kind, bits, text) in [
            (NodeKind::File, 0o644, "-rw-r--r--"),
            (NodeKind::Directory, 0o1777, "drwxrwxrwt"),
            (NodeKind::Directory, 0o1770, "drwxrwx--T"),
            (NodeKind::File, 0o4755, "-rwsr-xr-x"),
            (NodeKind::File, 0o2600, "-rw---S---"),
            (NodeKind::Symlink, 0o777, "lrwxrwxrwx"),
        ] {
            assert_eq!(mode(&attr(kind, bits)), text);
        }
    }
}
