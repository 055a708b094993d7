//! The trees of a mount without a kernel: what a switch has it forget, and when a tree is let go.

mod support;

use std::path::Path;
use std::sync::{Arc, Mutex};

use kitfs::cache::Cache;
use kitfs::fetch::{Access, Context, Kit, Limits, Request, Verify, resolve};
use kitfs::fs::trees::{Kernel, Trees};
use kitfs::fs::{Fs, FsError, Ino, Ownership};
use kitfs::source::Connection;
use support::FaultServer;
use support::kit::{KitBuilder, Served, tar};

/// What the kernel was asked to forget, in order: names with the number of their directory, and attributes.
#[derive(Debug, Clone, Default)]
struct Recorder(Arc<Mutex<Vec<(u64, String)>>>);

const ATTRIBUTES: &str = "its attributes";

impl Recorder {
    fn note(&self, number: Ino, what: &str) {
        self.0.lock().expect("held by nobody").push((number.0, what.to_owned()));
    }

    /// What was asked since it was last taken.
    fn take(&self) -> Vec<(u64, String)> {
        std::mem::take(&mut *self.0.lock().expect("held by nobody"))
    }
}

impl Kernel for Recorder {
    fn forget_name(&self, directory: Ino, name: &[u8]) {
        self.note(directory, std::str::from_utf8(name).expect("UTF-8"));
    }

    fn forget_attributes(&self, node: Ino) {
        self.note(node, ATTRIBUTES);
    }
}

fn kit(server: &FaultServer, tag: &str) -> Served {
    let (own, both) = (format!("only-{tag}.md"), format!("model/{tag}.bin"));
    let kit = KitBuilder::new().tar("model", "model", tar(&[(&both, b"weights")]));
    kit.tar("docs", &own, tar(&[(&own, tag.as_bytes())])).serve(server, tag)
}

async fn opened(dir: &Path, kit: &Served) -> Arc<Fs> {
    let cache = Cache::open(&dir.join("cache")).expect("a cache");
    let context = Context::new(Arc::new(cache), Limits::default(), Verify::Strict);
    let access = Access { connection: Connection::default(), kit_home: dir.join("kit"), require_fresh: false };
    let request = Request::new(kit.reference.parse().expect("a reference"));
    let kit = Kit::open(&context, resolve(&context, &access, &request).await.expect("resolves"));
    let mut tree = kit.skeleton();
    kit.probe(&context, &mut tree).await.expect("probes");
    let ownership = Ownership { uid: 0, gid: 0, file_mode: None, dir_mode: None, from_kit: false, for_others: false };
    Arc::new(Fs::new(kit, context, tree, ownership))
}

/// Trees of which the first is served, the second to be switched to, and what the kernel is asked.
async fn trees(dir: &Path) -> (Trees, [Arc<Fs>; 2], Recorder) {
    let server = FaultServer::empty("team/kit");
    let kits = [opened(dir, &kit(&server, "a")).await, opened(dir, &kit(&server, "b")).await];
    let (trees, kernel) = (Trees::new(kits[0].clone()), Recorder::default());
    trees.attach(Box::new(kernel.clone()));
    (trees, kits, kernel)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_has_the_kernel_forget_the_names_in_the_root_of_the_old_tree() {
    let temp = tempfile::tempdir().expect("a directory");
    let (trees, [_, b], kernel) = trees(temp.path()).await;
    let of_root = |names: &[&str]| names.iter().map(|name| (Ino::ROOT.0, (*name).to_owned())).collect::<Vec<_>>();
    trees.lookup(Ino::ROOT, b"only-a.md").await.expect("is there");
    assert_eq!(kernel.take(), [], "nothing before the switch");

    trees.switch(b.clone());
    let mut asked = kernel.take();
    // All names before the attributes, which end the switch.
    assert_eq!(asked.pop(), Some((Ino::ROOT.0, ATTRIBUTES.to_owned())));
    asked.sort();
    assert_eq!(asked, of_root(&[".kitfs", "Kitfile", "model", "only-a.md"]));
    assert!(matches!(trees.lookup(Ino::ROOT, b"only-a.md").await, Err(FsError::NotFound)));
    trees.lookup(Ino::ROOT, b"only-b.md").await.expect("is there");

    trees.switch(b);
    assert_eq!(kernel.take(), [], "to what is served already is no switch");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_is_let_go_with_the_last_that_the_kernel_holds_of_it() {
    let temp = tempfile::tempdir().expect("a directory");
    let (trees, [a, b], _) = trees(temp.path()).await;
    let digest = |fs: &Fs| fs.kit().resolved.digest;
    let (first, second) = (digest(&a), digest(&b));
    let name = |tag: &str| format!("only-{tag}.md").into_bytes();

    trees.switch(b.clone());
    assert_eq!(trees.digests(), [second], "of the first one nothing was known");
    trees.switch(a.clone());
    assert_eq!(trees.digests(), [first]);

    // A name that the kernel was told twice, a file and a directory that are open.
    let file = trees.lookup(Ino::ROOT, &name("a")).await.expect("is there").ino;
    assert_eq!(trees.lookup(Ino::ROOT, &name("a")).await.expect("is there").ino, file);
    trees.open(file).await.expect("opens");
    let handle = trees.opendir(Ino::ROOT).expect("opens").handle;
    trees.switch(b);
    assert_eq!(trees.digests(), [second, first]);
    trees.forget(file, 1);
    trees.close(file).await;
    trees.releasedir(Ino::ROOT, handle);
    assert_eq!(trees.digests(), [second, first], "one of the names is left");
    trees.getattr(file).await.expect("what is held is answered");
    assert_eq!(trees.digests(), [second, first], "and a request lets nothing go that is held");
    trees.forget(file, 1);
    assert_eq!(trees.digests(), [second]);
    assert!(matches!(trees.getattr(file).await, Err(FsError::Stale)));

    // The one that is served is never let go.
    let own = trees.lookup(Ino::ROOT, &name("b")).await.expect("is there").ino;
    trees.forget(own, 1);
    assert_eq!(trees.digests(), [second]);
    trees.getattr(own).await.expect("is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_open_keeps_the_tree_that_it_was_opened_in() {
    let temp = tempfile::tempdir().expect("a directory");
    let (trees, [a, b], _) = trees(temp.path()).await;
    let handle = trees.opendir(Ino::ROOT).expect("opens").handle;
    trees.switch(b.clone());
    assert_eq!(trees.digests(), [&b, &a].map(|fs| fs.kit().resolved.digest));
    let mut names = Vec::new();
    let take = |entry: kitfs::fs::DirEntry<'_>| {
        names.push(String::from_utf8(entry.name.to_vec()).expect("UTF-8"));
        false
    };
    trees.readdir(Ino::ROOT, handle, 0, false, take).await.expect("lists");
    names.sort();
    assert_eq!(names, [".", "..", "Kitfile", "model", "only-a.md"]);
    trees.releasedir(Ino::ROOT, handle);
    assert_eq!(trees.digests(), [b.kit().resolved.digest]);
}
