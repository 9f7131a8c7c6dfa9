//! The world's store, as one actor asks it.

use std::fmt::{Debug, Display, Formatter};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, stream};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

use super::world::{Answer, Condition, Object, ROOT, Refusal, Request, World};

pub struct Requests {
    pub world: Arc<World>,
    pub by: usize,
}

impl Debug for Requests {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "the store of actor {}", self.by)
    }
}

impl Display for Requests {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        Debug::fmt(self, f)
    }
}

fn refused(path: &str, refusal: Refusal) -> Error {
    let (path, source) = (path.to_string(), format!("{refusal:?}").into());
    match refusal {
        Refusal::NotFound => Error::NotFound { path, source },
        Refusal::Exists => Error::AlreadyExists { path, source },
        Refusal::Precondition => Error::Precondition { path, source },
        Refusal::Broken => Error::Generic { store: "simulated", source },
    }
}

fn unasked() -> Error {
    Error::NotSupported { source: "not a request of the protocol".into() }
}

/// Below the root of the place.
fn relative(path: &Path) -> String {
    path.as_ref().strip_prefix(ROOT).unwrap_or(path.as_ref()).trim_start_matches('/').to_string()
}

fn time(since: Duration) -> std::time::SystemTime {
    UNIX_EPOCH + since
}

fn meta(path: &str, object: &Object) -> ObjectMeta {
    ObjectMeta {
        location: Path::from(format!("{ROOT}/{path}")),
        last_modified: time(object.modified).into(),
        size: object.content.len() as u64,
        e_tag: Some(object.version.clone()),
        version: None,
    }
}

fn put_result(version: String) -> PutResult {
    PutResult { e_tag: Some(version), version: None, extensions: Default::default() }
}

async fn written(answer: impl Future<Output = std::result::Result<Answer, Refusal>> + Send, path: &str) -> Result<PutResult> {
    match answer.await {
        Ok(Answer::Written(version)) => Ok(put_result(version)),
        Ok(_) => Err(unasked()),
        Err(refusal) => Err(refused(path, refusal)),
    }
}

#[async_trait]
impl ObjectStore for Requests {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let condition = match opts.mode {
            PutMode::Overwrite => Condition::Always,
            PutMode::Create => Condition::Absent,
            PutMode::Update(version) => Condition::Version(version.e_tag.unwrap_or_default()),
        };
        let path = relative(location);
        let request = Request::Put(path.clone(), Bytes::from(payload), condition);
        written(self.world.ask(self.by, request), &path).await
    }

    async fn put_multipart_opts(&self, location: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let path = relative(location);
        match self.world.ask(self.by, Request::Begin(path.clone())).await {
            Ok(Answer::Begun(upload)) => Ok(Box::new(Parts { world: self.world.clone(), by: self.by, upload, path, parts: 0 })),
            Ok(_) => Err(unasked()),
            Err(refusal) => Err(refused(&path, refusal)),
        }
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let path = relative(location);
        let request = if options.head { Request::Head(path.clone()) } else { Request::Get(path.clone()) };
        match self.world.ask(self.by, request).await {
            Ok(Answer::Found(object)) => Ok(GetResult {
                meta: meta(&path, &object),
                range: 0..object.content.len() as u64,
                payload: GetResultPayload::Stream(stream::once(async move { Ok(object.content) }).boxed()),
                attributes: Default::default(),
                extensions: Default::default(),
            }),
            Ok(_) => Err(unasked()),
            Err(refusal) => Err(refused(&path, refusal)),
        }
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (world, by) = (self.world.clone(), self.by);
        let delete = move |location: Result<Path>| {
            let world = world.clone();
            async move {
                let location = location?;
                let path = relative(&location);
                let answer = world.ask(by, Request::Delete(path.clone())).await;
                answer.map(|_| location).map_err(|refusal| refused(&path, refusal))
            }
        };
        locations.then(delete).boxed()
    }

    fn list(&self, _: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        stream::once(async { Err(unasked()) }).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let folder = prefix.map(relative).unwrap_or_default();
        let found = match self.world.ask(self.by, Request::List(folder.clone())).await {
            Ok(Answer::Listed(found)) => found,
            Ok(_) => return Err(unasked()),
            Err(refusal) => return Err(refused(&folder, refusal)),
        };
        let mut result = ListResult { common_prefixes: Vec::new(), objects: Vec::new(), extensions: Default::default() };
        for (path, object) in found {
            let rest = path.strip_prefix(&folder).unwrap_or(&path).trim_start_matches('/');
            match rest.split_once('/') {
                None => result.objects.push(meta(&path, &object)),
                Some((inner, _)) => {
                    let prefix = Path::from(format!("{ROOT}/{folder}/{inner}").replace("//", "/"));
                    if !result.common_prefixes.contains(&prefix) {
                        result.common_prefixes.push(prefix);
                    }
                }
            }
        }
        Ok(result)
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(unasked())
    }
}

#[derive(Debug)]
struct Parts {
    world: Arc<World>,
    by: usize,
    upload: u64,
    path: String,
    parts: usize,
}

impl Debug for World {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

#[async_trait]
impl MultipartUpload for Parts {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.parts += 1;
        let path = self.path.clone();
        let answer = self.world.ask(self.by, Request::Part(self.upload, self.parts, Bytes::from(data)));
        async move { answer.await.map(|_| ()).map_err(|refusal| refused(&path, refusal)) }.boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        written(self.world.ask(self.by, Request::Complete(self.upload, self.path.clone())), &self.path).await
    }

    async fn abort(&mut self) -> Result<()> {
        let answer = self.world.ask(self.by, Request::Abort(self.upload)).await;
        answer.map(|_| ()).map_err(|refusal| refused(&self.path, refusal))
    }
}
